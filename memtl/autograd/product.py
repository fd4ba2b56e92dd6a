"""Products of activations: each operand is kept for the other one's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..storage.rebuilt import rebuilt
from .keep import Function, first_order, keep, kept
from .share import offer


class MatmulFunction(Function):
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


class BaddbmmFunction(Function):
    """y = beta c + alpha a b, batched; c's gradient is exact.

    Memory: as :class:`MatmulFunction`.
    """

    @staticmethod
    def forward(c, a, b, beta, alpha, format_a, format_b, need_a, need_b):
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)

    @staticmethod
    def setup_context(ctx, inputs, output):
        c, a, b, ctx.beta, ctx.alpha, format_a, format_b, need_a, need_b = inputs
        ctx.c_shape, ctx.c_dtype = c.shape, c.dtype
        keep(ctx, (a if need_b else None, format_a), (b if need_a else None, format_b))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (a, b), _ = kept(ctx)
        grad_c = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_c = (grad_out * ctx.beta).sum_to_size(ctx.c_shape).to(ctx.c_dtype)
        if b is not None and ctx.needs_input_grad[1]:
            grad_a = grad_out @ b.unpack().transpose(-2, -1) * ctx.alpha
        if a is not None and ctx.needs_input_grad[2]:
            grad_b = a.unpack().transpose(-2, -1) @ grad_out * ctx.alpha
        return grad_c, grad_a, grad_b, *(None,) * 6


class EinsumFunction(Function):
    """y = einsum("inputs a,inputs b->output", a, b), every index of an operand being in the other
    one or in the output. Memory: as :class:`MatmulFunction`."""

    @staticmethod
    def forward(a, b, indices, format_a, format_b, need_a, need_b):
        of_a, of_b, of_out = indices
        return torch.einsum(f"{of_a},{of_b}->{of_out}", a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, ctx.indices, format_a, format_b, need_a, need_b = inputs
        keep(ctx, (a if need_b else None, format_a), (b if need_a else None, format_b))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (a, b), _ = kept(ctx)
        of_a, of_b, of_out = ctx.indices
        grad_a = grad_b = None
        if b is not None and ctx.needs_input_grad[0]:
            grad_a = torch.einsum(f"{of_out},{of_b}->{of_a}", grad_out, b.unpack())
        if a is not None and ctx.needs_input_grad[1]:
            grad_b = torch.einsum(f"{of_a},{of_out}->{of_b}", a.unpack(), grad_out)
        return grad_a, grad_b, *(None,) * 5


class MultiplyFunction(Function):
    """y = a * b, or c + value * a * b, elementwise with broadcasting; c's gradient is exact.

    Memory: its format's ``nbytes`` of each operand whose partner needs a gradient, in its own
    shape, before broadcasting.
    """

    @staticmethod
    def forward(c, a, b, value, format_a, format_b, need_a, need_b):
        return torch.mul(a, b) if c is None else torch.addcmul(c, a, b, value=value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        c, a, b, ctx.value, format_a, format_b, need_a, need_b = inputs
        ctx.shapes = tuple(None if t is None else t.shape for t in (c, a, b))
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (c, a, b))
        a, b = keep(ctx, (a if need_b else None, format_a), (b if need_a else None, format_b))
        if c is None and a is not None and b is not None and format_a.rebuild | format_b.rebuild:
            offer(output, rebuilt(torch.mul, a, b, shape=output.shape, dtype=output.dtype))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (a, b), _ = kept(ctx)
        grads: list[Tensor | None] = [None, None, None]
        if ctx.shapes[0] is not None and ctx.needs_input_grad[0]:
            grads[0] = grad_out
        for i, factor in ((1, b), (2, a)):
            if factor is not None and ctx.needs_input_grad[i]:
                factor = factor.unpack()
                grads[i] = grad_out * (factor if ctx.value == 1 else factor * ctx.value)
        summed = (
            None if g is None else g.sum_to_size(shape).to(dtype)
            for g, shape, dtype in zip(grads, ctx.shapes, ctx.dtypes, strict=True)
        )
        return *summed, *(None,) * 5
