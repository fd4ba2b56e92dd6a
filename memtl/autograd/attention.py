"""Softmax and scaled dot-product attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..storage import Bits, Dense
from .keep import keep, kept


class SoftmaxFunction(torch.autograd.Function):
    """y = softmax(x) along ``dim``. Memory: ``format.nbytes(y)``."""

    @staticmethod
    def forward(x, dim, dtype, format):
        return F.softmax(x, dim, dtype=dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.dim, _, format = inputs
        ctx.dtype = x.dtype
        keep(ctx, (output, format))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        (y,), _ = kept(ctx)
        return softmax_grad(grad_out, y.unpack(), ctx.dim).to(ctx.dtype), None, None, None


def softmax_grad(grad_out: Tensor, y: Tensor, dim: int) -> Tensor:
    """y * (g - sum(g y)): the gradient through y = softmax(x)."""
    weighted = grad_out * y
    return weighted - y * weighted.sum(dim, keepdim=True)


class AttentionFunction(torch.autograd.Function):
    """softmax(scale q k^T + mask) v, kept as q, k, v alone; backward runs torch's attention again.

    Memory: ``format.nbytes`` of q, k and v, a reference to the mask, the generator's state when
    there is dropout; neither the map nor the output nor the log-sum.
    """

    @staticmethod
    def forward(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, format, rng_state):
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, *ctx.options, format, rng_state = inputs
        keep(ctx, (q, format), (k, format), (v, format), exact=(mask, rng_state))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        packed, (mask, rng_state) = kept(ctx)
        q, k, v = (t.unpack() for t in packed)
        dropout_p, is_causal, scale, enable_gqa = ctx.options
        mask_grad = ctx.needs_input_grad[3]
        dq, dk, dv, dmask = torch.ops.memtl.attention_grad(
            grad_out, q, k, v, mask, dropout_p, rng_state, is_causal, scale, enable_gqa, mask_grad
        )
        return dq, dk, dv, dmask if mask_grad else None, *(None,) * 6


class ExplicitAttentionFunction(torch.autograd.Function):
    """The same attention, its probabilities kept beside q, k and v, as Back Razor keeps them.

    For formats under which a softmax recomputed from the stored q and k would be wrong (top-k), and
    for dropout under ``torch.compile``, where a generator's state cannot be replayed.

    Memory: ``format.nbytes`` of q, k, v and of the [B, H, N, N] probabilities, a bit an element of
    those for dropout. Returns the output and the packed dropout mask.
    """

    @staticmethod
    def forward(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, format):
        if dropout_p == 0:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return out, q.new_empty((0,), dtype=torch.uint8)
        p = _probabilities(q, k, mask, is_causal, scale)
        noise = F.dropout(torch.ones_like(p), dropout_p, True)
        return (p * noise) @ _expand_heads(v, q), *Bits().pack(noise != 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.dropout_p, is_causal, scale, _, format = inputs
        _, bits = output
        ctx.mark_non_differentiable(bits)
        ctx.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        ctx.mask_shape = None if mask is None else mask.shape
        p = _probabilities(q, k, mask, is_causal, scale)
        keep(ctx, (q, format), (k, format), (v, format), (p, format), (bits, Dense()))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _bits):
        (q_, k_, v_, p_, bits), _ = kept(ctx)
        q, k, v, p = (t.unpack() for t in (q_, k_, v_, p_))
        heads = k.shape[1] if k.dim() > 3 else None
        k, v = _expand_heads(k, q), _expand_heads(v, q)

        def dropped(x: Tensor) -> Tensor:
            if ctx.dropout_p == 0:
                return x
            return Bits().apply(bits.tensors, x, 1 / (1 - ctx.dropout_p) if ctx.dropout_p < 1 else 0.0)

        dv = dropped(p).transpose(-2, -1) @ grad_out
        ds = softmax_grad(dropped(grad_out @ v.transpose(-2, -1)), p, -1)
        dq = ds @ k * ctx.scale
        dk = ds.transpose(-2, -1) @ q * ctx.scale
        dmask = ds.sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        return dq, _sum_heads(dk, heads), _sum_heads(dv, heads), dmask, *(None,) * 5


def _probabilities(q, k, mask, is_causal, scale) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    # sqrt(scale) on both sides, as torch's math attention does, to match it bit for bit.
    k = _expand_heads(k, q)
    root = math.sqrt(scale)
    scores = (q * root) @ (k.transpose(-2, -1) * root)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)


def _expand_heads(t: Tensor, q: Tensor) -> Tensor:
    """Repeat key or value heads to q's, for grouped-query attention."""
    if q.dim() < 4 or t.shape[1] == q.shape[1]:
        return t
    return t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def _sum_heads(grad: Tensor, heads: int | None) -> Tensor:
    if heads is None or grad.shape[1] == heads:
        return grad
    return grad.unflatten(1, (heads, -1)).sum(2)
