"""Linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd.linear import LinearFunction
from ..storage import Bits, Format
from .common import LINEAR, autocast, check_format, check_shape, check_tensors, needs, sizes


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    format: Format = LINEAR,
    transposed: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b, with x kept in ``format`` for the weight gradient.

    Args:
        x: [..., D], floating point.
        weight: [O, D]; with ``transposed`` [D, O], as in Hugging Face's ``Conv1D``.
        bias: [O] or None.
        format: how x is kept; the weight gradient is taken from it.
        mask: bits of the weight (:class:`memtl.storage.Bits`), uint8 [ceil(O D / 8)]: W * mask
            stands in W's place, and W's gradient is 0 where a bit is clear. All three products run
            over the other weights alone, on a CPU (on CUDA they are dense), and equal the dense
            ones up to the order of their sums, for operands that are finite;
            :func:`memtl.functional.sparse.sparse_pays` says when that is faster.

    Raises:
        TypeError: an argument is no tensor, or sparse, or not of a real floating-point type, or
            ``mask`` not of uint8.
        ValueError: shapes do not fit, or ``mask`` is given with ``transposed``.

    Memory: ``format.nbytes(x)``, nothing if the weight needs no gradient; weight and mask are kept
    by reference. Back Razor (Jiang et al.,
    NeurIPS 2022) is this with ``TopK``.
    """
    check_tensors("linear", x=x, weight=weight, bias=bias)
    check_format("linear", format)
    features = weight.shape[0 if transposed else -1]
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != features:
        wanted = "[D, O]" if transposed else "[O, D]"
        raise ValueError(
            f"linear: expected x [..., D] and weight {wanted}, got {sizes(x)} and {sizes(weight)}"
        )
    check_shape("linear", "bias", bias, (weight.shape[1 if transposed else 0],), x)
    if mask is not None:
        _check_mask(mask, weight, transposed)
    if not weight.numel():  # no rows can be counted, nothing is masked
        return F.linear(x, weight.t() if transposed else weight, bias)
    if transposed and bias is None:
        bias = weight.new_zeros(weight.shape[1])
    need_x, need_weight, need_bias = needs(x, weight, bias)
    if not (need_x or need_weight or need_bias):
        if not transposed and mask is None:
            return F.linear(x, weight, bias)
    x, cast = autocast(x)
    return LinearFunction.apply(
        x, weight, bias, mask, format, cast, transposed, need_x, need_weight
    )


def _check_mask(mask: Tensor, weight: Tensor, transposed: bool) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.uint8:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"linear: mask must be a uint8 tensor of bits, got {got}")
    if transposed:
        raise ValueError("linear: a mask is one of weight [O, D], not of a transposed one")
    count = Bits().nbytes(weight.shape, torch.bool)
    if tuple(mask.shape) != (count,) or mask.device != weight.device:
        raise ValueError(
            f"linear: expected mask [{count}] on {weight.device} for weight {sizes(weight)}, got "
            f"{sizes(mask)} on {mask.device}"
        )
