"""Linear layers: the input is needed for the weight gradient alone, and is kept in any format."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..storage import Dense
from . import region
from .keep import Function, first_order, keep, kept
from .share import held


class LinearFunction(Function):
    """y = x W^T + b. Gradients of x and b are exact; that of W is taken from the stored x.

    Memory: ``format.nbytes(x)`` if the weight trains, else nothing; the weight itself is referenced
    when x needs a gradient, or what it is made of (:func:`memtl.autograd.share.held`). With
    ``cast`` (autocast) weight and bias are cast in the forward and, again, in the backward, so that
    no second copy of them is kept, and the weight gradient reaches the parameter in float32.
    ``transposed``: W is [in, out], Hugging Face's Conv1D. With ``mask``, bits of W that are kept by
    reference, all three products are those of W * mask.
    """

    @staticmethod
    def forward(x, weight, bias, mask, format, cast, transposed, need_x, need_weight):
        if region.at_the_end():  # of what is run again, with all that backward needs of it
            return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))
        if cast is not None:
            weight = weight.to(cast)
            bias = None if bias is None else bias.to(cast)
        if mask is not None:
            rows = x.reshape(-1, x.shape[-1])
            y = torch.ops.memtl.masked_linear(rows, weight, mask, bias)
            return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
        if transposed:  # the very call of transformers.pytorch_utils.Conv1D
            flat = torch.addmm(bias, x.view(-1, x.size(-1)), weight)
            return torch.ops.aten._unsafe_view(flat, (*x.shape[:-1], weight.shape[1]))
        if need_weight and x.dim() > 2 and not x.is_contiguous():  # torch folds it if W trains
            y = x.reshape(-1, x.shape[-1]) @ weight.t()
            y = y if bias is None else y.add_(bias)
            return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
        # In place operations on the result are refused where it is a view made in here.
        y = F.linear(x, weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, mask, format, cast, transposed, need_x, need_weight = inputs
        ctx.transposed = transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_dtype = weight.dtype
        # To a product of more dimensions torch adds the bias by itself, unless x is contiguous.
        ctx.apart = x.dim() > 2 and not x.is_contiguous() and not transposed
        ctx.columns = format.exact and x.dim() == 2 and x.stride() == (1, x.shape[0])
        weight = held(weight) if need_x else None
        mask = mask if need_x or need_weight else None
        keep(ctx, (x if need_weight else None, format), (weight, Dense()), exact=(mask,))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (x, weight), (mask,) = kept(ctx)
        grad_x = grad_weight = grad_bias = None
        if weight is not None and ctx.needs_input_grad[0]:
            weight = weight.unpack().to(grad_out.dtype)
            weight = weight.t() if ctx.transposed else weight
            if mask is not None:
                rows = grad_out.reshape(-1, grad_out.shape[-1])
                grad_x = torch.ops.memtl.masked_linear_input_grad(rows, weight, mask)
                grad_x = grad_x.view(*grad_out.shape[:-1], weight.shape[1])
            else:  # of an x stored by columns torch makes the gradient by columns
                grad_x = (weight.t() @ grad_out.t()).t() if ctx.columns else grad_out @ weight
        if x is not None and ctx.needs_input_grad[1]:
            if mask is not None:
                grad_weight = x.masked_weight_grad(grad_out, mask).to(ctx.weight_dtype)
            elif ctx.transposed and x.format.exact:  # in the order in which torch multiplies them
                flat = x.unpack(grad_out.dtype).flatten(0, -2)
                grad_weight = (flat.t() @ grad_out.flatten(0, -2)).to(ctx.weight_dtype)
            else:
                grad_weight = x.weight_grad(grad_out).to(ctx.weight_dtype)
                grad_weight = grad_weight.t() if ctx.transposed else grad_weight
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            rows = grad_out if ctx.apart else grad_out.reshape(-1, grad_out.shape[-1])
            grad_bias = rows.sum(tuple(range(rows.dim() - 1))).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None
