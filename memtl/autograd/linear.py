"""Linear layers: the input is needed for the weight gradient alone, and is kept in any format."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .keep import first_order, keep, kept


class LinearFunction(torch.autograd.Function):
    """y = x W^T + b. Gradients of x and b are exact; that of W is taken from the stored x.

    Memory: ``format.nbytes(x)`` if the weight trains, else nothing; the weight itself is referenced
    when x needs a gradient. With ``cast`` (autocast) weight and bias are cast in the forward and,
    again, in the backward, so that no second copy of them is kept, and the weight gradient reaches
    the parameter in float32. ``transposed``: W is [in, out], Hugging Face's Conv1D.
    """

    @staticmethod
    def forward(x, weight, bias, format, cast, transposed, need_x, need_weight):
        if cast is not None:
            weight = weight.to(cast)
            bias = None if bias is None else bias.to(cast)
        if transposed:  # the very call of transformers.pytorch_utils.Conv1D
            flat = torch.addmm(bias, x.view(-1, x.size(-1)), weight)
            return flat.view(*x.shape[:-1], weight.shape[1])
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, format, cast, transposed, need_x, need_weight = inputs
        ctx.transposed = transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_dtype = weight.dtype
        keep(ctx, (x if need_weight else None, format), exact=(weight if need_x else None,))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (x,), (weight,) = kept(ctx)
        grad_x = grad_weight = grad_bias = None
        if weight is not None and ctx.needs_input_grad[0]:
            weight = weight.to(grad_out.dtype)
            grad_x = grad_out @ (weight.t() if ctx.transposed else weight)
        if x is not None and ctx.needs_input_grad[1]:
            grad_weight = x.weight_grad(grad_out).to(ctx.weight_dtype)
            grad_weight = grad_weight.t() if ctx.transposed else grad_weight
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_out.reshape(-1, grad_out.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class MatmulFunction(torch.autograd.Function):
    """y = a b (batched), each operand kept in its format; attention written out by hand.

    Memory: its format's ``nbytes`` of each operand whose partner needs a gradient.
    """

    @staticmethod
    def forward(a, b, format_a, format_b, need_a, need_b):
        return torch.matmul(a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, format_a, format_b, need_a, need_b = inputs
        ctx.shapes = a.shape, b.shape
        keep(ctx, (a if need_b else None, format_a), (b if need_a else None, format_b))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (a, b), _ = kept(ctx)
        grad_a = grad_b = None
        if b is not None and ctx.needs_input_grad[0]:
            grad_a = (grad_out @ b.unpack().transpose(-2, -1)).sum_to_size(ctx.shapes[0])
        if a is not None and ctx.needs_input_grad[1]:
            grad_b = (a.unpack().transpose(-2, -1) @ grad_out).sum_to_size(ctx.shapes[1])
        return grad_a, grad_b, None, None, None, None
