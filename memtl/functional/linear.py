"""Linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..autograd.linear import LinearFunction
from ..storage import Format
from .common import LINEAR, autocast, check_format, check_shape, check_tensors, needs, sizes


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    format: Format = LINEAR,
    transposed: bool = False,
) -> Tensor:
    """y = x W^T + b, with x kept in ``format`` for the weight gradient.

    Args:
        x: [..., D], floating point.
        weight: [O, D]; with ``transposed`` [D, O], as in Hugging Face's ``Conv1D``.
        bias: [O] or None.
        format: how x is kept; the weight gradient is taken from it.

    Raises:
        TypeError: an argument is no tensor, or sparse, or not of a real floating-point type.
        ValueError: shapes do not fit.

    Memory: ``format.nbytes(x)``, nothing if the weight needs no gradient. Back Razor (Jiang et al.,
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
    if transposed and bias is None:
        bias = weight.new_zeros(weight.shape[1])
    need_x, need_weight, need_bias = needs(x, weight, bias)
    if not (need_x or need_weight or need_bias):
        if not transposed:
            return F.linear(x, weight, bias)
    x, cast = autocast(x)
    return LinearFunction.apply(x, weight, bias, format, cast, transposed, need_x, need_weight)
