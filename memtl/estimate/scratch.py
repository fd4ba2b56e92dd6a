"""What operators allocate and free inside, on a CPU, where that is as large as what they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
FEW = 3  # channels up to which oneDNN reads an image as it lies


def within(func: Any, args: Sequence[Any], out: Any) -> int:
    """Bytes that are in use at once inside ``func(*args)``, which gave ``out``, that included; 0
    where nothing is known of it.

    oneDNN computes convolutions in an order of its own, with channels in blocks, and copies what it
    reads from the usual order, and what it gives back to it.
    """
    if func is aten.convolution.default and _by_onednn(args[0], args[1], args[3:9]):
        x, w = args[:2]
        return max(_blocked(x) + _blocked(out) + w.nbytes, _blocked(out) + out.nbytes)
    if func is aten.convolution_backward.default and _by_onednn(args[1], args[2], args[4:10]):
        y, x, w = args[:3]
        wants_x, wants_w, _ = args[10]
        read = _blocked(y) + w.nbytes
        strided = max(args[4]) > 1 and args[9] == 1  # measured: the gradient of x a third time
        for_x = wants_x * max(read + _blocked(x), (1 + strided) * _blocked(x) + x.nbytes)
        for_w = wants_w * (wants_x * x.nbytes + read + _blocked(x))
        return max(for_x, for_w)
    if func is torch.ops.memtl.attention_grad.default and args[4] is None and not args[5]:
        # torch's own attention once more, and its gradients in an order of their own.
        grad_out, *operands = args[:4]
        return grad_out.nbytes + 2 * sum(t.nbytes for t in operands)
    if func.namespace == "memtl":  # its kernels read memory in order
        given, back = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (args, out))
        copied = sum(t.nbytes for t in given if not t.is_contiguous())
        return copied + sum(t.nbytes for t in back)
    return 0


def _by_onednn(x: Tensor, w: Tensor, geometry: Sequence[Any]) -> bool:
    stride, padding, dilation, transposed, output_padding, groups = geometry
    if transposed or (x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1):
        return False
    backend = torch._C._select_conv_backend(
        x, w, None, stride, padding, dilation, transposed, output_padding, groups, None
    )
    return backend == torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]


def _blocked(t: Tensor) -> int:
    """Bytes of a copy of t with channels in blocks, filled up."""
    samples, channels, *spatial = t.shape
    if channels <= FEW:
        return 0
    block = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    return samples * -(-channels // block) * block * math.prod(spatial) * t.element_size()
