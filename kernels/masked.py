"""A linear layer over the weights that a mask leaves, on a GPU.

``masked_linear``              x (weight * mask)^T + bias.
``masked_linear_input_grad``   grad_out (weight * mask).
``masked_linear_weight_grad``  (grad_out^T x) * mask.

There is no kernel here but that of ``bits_apply``: the products are torch's, dense, on the tensor
cores, which need a whole tile of zeros to have less to do, and survivors are scattered. So the
weight is masked, which reads and writes it once more, and then multiplied: operands of one dtype in
that, others in float32. They sum up as torch's own linear layers do, in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memtl._ops import _check_masked_input_grad, _check_masked_linear, _check_masked_weight_grad

from .common import check_devices


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _factor(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype to multiply in: that of x if all have it, else the one of its sums."""
    same = all(t is None or t.dtype == x.dtype for t in others)
    return x.dtype if same else _accumulated(x.dtype)


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """x (weight * mask)^T + bias, [T, O], in the dtype of x."""
    check_devices("masked_linear", x=x, weight=weight, mask=mask, bias=bias)
    _check_masked_linear(x, weight, mask, bias)
    factor = _factor(x, weight, bias)
    kept = torch.ops.memtl.bits_apply(weight, mask, 1.0).to(factor)
    y = F.linear(x.to(factor), kept, None if bias is None else bias.to(factor))
    return y.to(x.dtype)


def masked_linear_input_grad(grad_out: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """grad_out (weight * mask), [T, I], in the dtype of grad_out."""
    check_devices("masked_linear_input_grad", grad_out=grad_out, weight=weight, mask=mask)
    _check_masked_input_grad(grad_out, weight, mask)
    factor = _factor(grad_out, weight)
    kept = torch.ops.memtl.bits_apply(weight, mask, 1.0).to(factor)
    return (grad_out.to(factor) @ kept).to(grad_out.dtype)


def masked_linear_weight_grad(grad_out: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """(grad_out^T x) * mask, [O, I], in float32 (float64 of float64)."""
    check_devices("masked_linear_weight_grad", grad_out=grad_out, x=x, mask=mask)
    _check_masked_weight_grad(grad_out, x, mask)
    wide = _accumulated(x.dtype)
    if x.is_cuda and x.dtype != wide:  # multiplied in 16 bits, but not rounded to them
        grad = torch.mm(grad_out.t(), x, out_dtype=wide)
    else:
        grad = grad_out.t().to(wide) @ x.to(wide)
    return torch.ops.memtl.bits_apply(grad, mask, 1.0)
