"""Products of activations: each operand is kept for the other one's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..storage import Format
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


class ExactMatmulFunction(Function):
    """y = a b, two matrices or two batches of them, under an exact format: the gradients are
    torch's, bit for bit. Memory: a reference to each operand whose partner needs a gradient."""

    @staticmethod
    def forward(a, b, format, need_a, need_b):
        return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, format, need_a, need_b = inputs
        # Of a matrix that is stored by columns torch makes the gradient by columns.
        ctx.columns = [t.dim() == 2 and t.stride() == (1, t.shape[0]) for t in (a, b)]
        keep(ctx, (a if need_b else None, format), (b if need_a else None, format))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (a, b), _ = kept(ctx)
        grad_a = grad_b = None
        if b is not None and ctx.needs_input_grad[0]:
            b = b.unpack()
            grad_a = (b @ grad_out.mT).mT if ctx.columns[0] else grad_out @ b.mT
        if a is not None and ctx.needs_input_grad[1]:
            a = a.unpack()
            grad_b = (grad_out.mT @ a).mT if ctx.columns[1] else a.mT @ grad_out
        return grad_a, grad_b, None, None, None


def folds(a: Tensor, b: Tensor, need_a: bool, need_b: bool) -> bool:
    """Whether torch multiplies a batch and a matrix as two matrices."""
    batch, need = (a, need_b) if a.dim() >= b.dim() else (b.mT, need_a)
    if batch.dim() < 3 or min(a.dim(), b.dim()) > 2:
        return False
    if need:
        return True
    if a.dim() == 2:
        return False
    shape, stride = batch.shape, batch.stride()
    return batch.numel() == 0 or all(
        stride[i] == stride[i + 1] * shape[i + 1] for i in range(batch.dim() - 2)
    )


def exact_matmul(a: Tensor, b: Tensor, format: Format, need_a: bool, need_b: bool) -> Tensor:
    """torch.matmul, step by step: what it copies is kept, and no more."""
    view = torch.ops.aten._unsafe_view
    if a.dim() == b.dim() == 2:
        return ExactMatmulFunction.apply(a, b, format, need_a, need_b)
    if folds(a, b, need_a, need_b):
        if a.dim() > 2:
            flat = a.reshape(a.shape[:-1].numel(), a.shape[-1])
            y = ExactMatmulFunction.apply(flat, b, format, need_a, need_b)
            return view(y, (*a.shape[:-1], b.shape[-1]))
        batch = b.mT
        flat = batch.reshape(batch.shape[:-1].numel(), batch.shape[-1])
        y = ExactMatmulFunction.apply(flat, a.t(), format, need_b, need_a)
        return view(y, (*batch.shape[:-1], a.shape[0])).mT.contiguous()
    if a.dim() == b.dim() == 3 and a.shape[0] != b.shape[0]:
        if a.shape[0] == 1 and need_a:
            return exact_matmul(a[0], b, format, need_a, need_b)
        if b.shape[0] == 1 and need_b:
            return exact_matmul(a, b[0], format, need_a, need_b)
    size = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    operands = []
    for t in (a, b):
        shape = (size.numel(), *t.shape[-2:])
        operands.append(t if t.shape == shape else t.expand(*size, *shape[1:]).reshape(shape))
    y = ExactMatmulFunction.apply(*operands, format, need_a, need_b)
    return view(y, (*size, a.shape[-2], b.shape[-1]))


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
