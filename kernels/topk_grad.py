"""Weight gradients from what top-k has kept.

``topk_weight_grad``       grad_out^T x of a linear layer.
``topk_conv_weight_grad``  that of a convolution.

The dense x never exists. Some rows of it are decoded at a time, 32 MiB, or one row if that is more,
by whoever serves ``topk_unpack``; torch's own product reads them, and what it gives is added up in
float32. No kernel here decodes as it multiplies: each tile of outputs would have to decode all of x
again, and decoding a block takes a warp several hundred instructions, more than a tile's share of
the product takes the tensor cores. A kernel in CUDA C++ that did so took an H200 four to five times
as long. Decoded once, it is a small part of the work.

The product is that of grad_out's dtype. In 16 bits x is rounded to it, as torch's own gradient
reads it, and the sum is kept in float32; of a convolution, torch rounds the sum of the samples at
hand. In float32, to which float64 is rounded, it is torch's float32 product: TensorFloat-32 is used
where the user has allowed it.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .common import check_devices, check_floating
from .topk import check_packed

Packed = tuple[Tensor, Tensor, Tensor, Tensor]
"""values, positions, scale, counts."""

DENSE_BYTES = 2**25
"""Of x, decoded at a time. Each time costs another addition to the whole gradient."""


def topk_weight_grad(
    values: Tensor,
    positions: Tensor,
    scale: Tensor,
    counts: Tensor,
    grad_out: Tensor,
    n: int,
    features: int,
    k: int,
    k_tail: int,
    bitmap: bool,
) -> Tensor:
    """grad_out [T, O] -> grad_out^T x [O, D] in float32."""
    name = "topk_weight_grad"
    packed = (values, positions, scale, counts)
    check_packed(name, *packed, n, k, k_tail, bitmap)
    check_floating(name, grad_out=grad_out)
    check_devices(name, values=values, grad_out=grad_out)
    torch._check(
        grad_out.dim() == 2,
        lambda: f"{name}: expected grad_out [T, O], got {tuple(grad_out.shape)}",
    )
    tokens, outputs = grad_out.shape
    torch._check(
        features >= 0 and tokens * features == values.shape[0] * n,
        lambda: (
            f"{name}: {values.shape[0]} rows of {n} are not {tokens} tokens of {features} features"
        ),
    )
    total = grad_out.new_zeros((outputs, features), dtype=torch.float32)
    if not (total.numel() and n):
        return total
    dtype = _dtype(grad_out)
    whole = features // math.gcd(n, features)  # rows that are so many whole tokens
    for first, some in _pieces(packed, n * dtype.itemsize, whole):
        x = torch.ops.memtl.topk_unpack(*some, n, k, k_tail, bitmap, dtype).view(-1, features)
        token = first * n // features
        total += _product(grad_out[token : token + len(x)].to(dtype), x)
        del x  # before the next rows are decoded
    return total


def topk_conv_weight_grad(
    values: Tensor,
    positions: Tensor,
    scale: Tensor,
    counts: Tensor,
    grad_out: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    k: int,
    k_tail: int,
    bitmap: bool,
) -> Tensor:
    """grad_out [B, O, ...], x [B, *input_size] -> [O, C, *kernel_size] in float32."""
    name = "topk_conv_weight_grad"
    channels, *spatial = input_size
    n = math.prod(input_size)
    packed = (values, positions, scale, counts)
    check_packed(name, *packed, n, k, k_tail, bitmap)
    check_floating(name, grad_out=grad_out)
    check_devices(name, values=values, grad_out=grad_out)
    _check_geometry(
        name, values.shape[0], grad_out, spatial, kernel_size, stride, padding, dilation
    )
    size = (grad_out.shape[1], channels, *kernel_size)
    total = grad_out.new_zeros(size, dtype=torch.float32)
    if not (total.numel() and grad_out.numel() and n):
        return total
    dtype = _dtype(grad_out)
    weight = grad_out.new_empty(size, dtype=dtype)  # not read
    geometry = (stride, padding, dilation, False, [0] * len(spatial), 1)
    for first, some in _pieces(packed, n * dtype.itemsize):
        x = torch.ops.memtl.topk_unpack(*some, n, k, k_tail, bitmap, dtype)
        if channels_last:
            x = x.view(-1, *spatial, channels).movedim(-1, 1)
        else:
            x = x.view(-1, channels, *spatial)
        grad = grad_out[first : first + len(x)].to(dtype)
        total += torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, [False, True, False]
        )[1]
        del x  # before the next samples are decoded
    return total


def _dtype(grad_out: Tensor) -> torch.dtype:
    """What is multiplied in."""
    return grad_out.dtype if grad_out.dtype.itemsize == 2 else torch.float32


def _pieces(packed: Packed, row_bytes: int, whole: int = 1) -> Iterator[tuple[int, Packed]]:
    """The first of some rows, a multiple of ``whole`` of them but at the end, and what is kept of
    those."""
    values, positions, scale, counts = packed
    each = max(1, DENSE_BYTES // (row_bytes * whole)) * whole
    for first in range(0, len(values), each):
        rows = slice(first, first + each)
        yield (
            first,
            (
                values[rows],
                positions[rows],
                scale[rows] if scale.numel() else scale,
                counts[rows] if counts.numel() else counts,
            ),
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float32."""
    if a.dtype == torch.float32:
        return a.t() @ b
    if not a.is_cuda:  # interpreted: torch has no such product there
        return a.t().float() @ b.float()
    return torch.mm(a.t(), b, out_dtype=torch.float32)


def _check_geometry(
    name: str,
    batch: int,
    grad_out: Tensor,
    spatial: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raise unless grad_out is that of these samples; torch's backward takes its size as given."""
    options = (kernel_size, stride, padding, dilation)
    torch._check(
        1 <= len(spatial) <= 3 and all(len(option) == len(spatial) for option in options),
        lambda: (
            f"{name}: expected input_size (C, ...) and, for each of 1 to 3 spatial dimensions, one "
            f"kernel_size, stride, padding and dilation, got {len(spatial)} spatial dimensions "
            f"and {[len(option) for option in options]}"
        ),
    )
    torch._check(
        min(*kernel_size, *stride, *dilation) >= 1 and min(padding) >= 0,
        lambda: (
            f"{name}: expected kernel_size, stride and dilation of 1 or more and padding of 0 or "
            f"more, got {list(kernel_size)}, {list(stride)}, {list(dilation)} and {list(padding)}"
        ),
    )
    wanted = [
        (size + 2 * pad - dilate * (width - 1) - 1) // step + 1
        for size, width, step, pad, dilate in zip(spatial, *options, strict=True)
    ]
    torch._check(
        min(wanted) >= 1 and (grad_out.shape[0], *grad_out.shape[2:]) == (batch, *wanted),
        lambda: (
            f"{name}: expected grad_out [{batch}, O, {', '.join(map(str, wanted))}], got "
            f"{list(grad_out.shape)}"
        ),
    )
