"""Queries that train over keys and values that do not: the gradient is known in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from .keep import Function, constant, first_order


class QueryAttentionFunction(Function):
    """out = softmax(scale q k^T + mask) v, with the gradient of q alone.

    With ``jacobian``, a dtype, J = d out / d q is made beside the output and dq = J d(out); keys
    and values are then not kept. Without, q, k, v and the mask are, and backward computes the
    softmax again. Memory: B H T d e elements of that dtype; else those of q, k, v and the mask.
    """

    @staticmethod
    def forward(q, k, v, mask, scale, jacobian):
        return torch.ops.memtl.query_attention(q, k, v, mask, scale, jacobian)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.scale, jacobian = inputs
        ctx.shared, ctx.dtype = q.shape[0] == 1 != k.shape[0], q.dtype
        _, j = output
        constant(ctx, j)
        ctx.save_for_backward(*((j,) if jacobian else (q, *map(_alone, (k, v, mask)))))

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _):
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them once
        if len(saved) == 1:
            (j,) = saved
            wide = torch.promote_types(j.dtype, torch.float32)
            # Of the ways to write it the one that torch has fast code for.
            grad = (grad_out.to(wide)[..., None, :] @ j.to(wide).mT)[..., 0, :]
        else:
            grad = torch.ops.memtl.query_attention_grad(grad_out, *saved, ctx.scale)
        if ctx.shared:
            grad = grad.sum(0, keepdim=True)
        return grad.to(ctx.dtype), None, None, None, None, None


def _alone(t: Tensor | None) -> Tensor | None:
    """t, or a copy: keys and values are views of a larger tensor as a rule, which they must not
    keep alive."""
    if t is None:
        return None
    if not t.is_contiguous() or torch.compiler.is_compiling():
        return t.contiguous()
    whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return t if whole else t.clone()


def bytes_kept(q: Tensor, k: Tensor, v: Tensor, jacobian: torch.dtype | None) -> int:
    """Bytes that the Function keeps, the mask left out."""
    if jacobian is None:
        return sum(t.numel() * t.element_size() for t in (q, k, v))
    batch, heads, _, e = v.shape
    return batch * heads * q.shape[2] * q.shape[3] * e * jacobian.itemsize
