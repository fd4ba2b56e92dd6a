"""A linear layer over the weights that a mask leaves: the dense products of the masked weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import bits_apply


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """x (weight * mask)^T + bias, [T, O]."""
    wide = _accumulated(x.dtype)
    kept = bits_apply(weight.to(wide), mask, 1.0)
    return F.linear(x.to(wide), kept, None if bias is None else bias.to(wide)).to(x.dtype)


def masked_linear_input_grad(grad_out: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """grad_out (weight * mask), [T, I]."""
    wide = _accumulated(grad_out.dtype)
    return (grad_out.to(wide) @ bits_apply(weight.to(wide), mask, 1.0)).to(grad_out.dtype)


def masked_linear_weight_grad(grad_out: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """(grad_out^T x) * mask, [O, I]."""
    wide = _accumulated(x.dtype)
    return bits_apply(grad_out.to(wide).t() @ x.to(wide), mask, 1.0)
