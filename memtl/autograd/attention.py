"""Softmax and scaled dot-product attention."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import Bits, Dense, Format, Packed, Quantized
from ..storage.rebuilt import laid, rebuilt
from .keep import Function, constant, first_order, in_dtype, keep, kept
from .share import offer


class SoftmaxFunction(Function):
    """y = softmax(x) along ``dim``. Memory: ``format.nbytes(y)``."""

    @staticmethod
    def forward(x, dim, dtype, format):
        return F.softmax(x, dim, dtype=dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.dim, _, format = inputs
        ctx.dtype = x.dtype
        (packed,) = keep(ctx, (stored_probabilities(output, format), format))
        if isinstance(format, Quantized):
            packed = rebuilt(torch.square, packed, shape=output.shape, dtype=output.dtype)
        offer(output, packed)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (packed,), _ = kept(ctx)
        y = read_probabilities(packed)
        if packed.format.exact:
            grad_x = torch.ops.aten._softmax_backward_data(grad_out, y, ctx.dim, y.dtype)
        else:
            grad_x = softmax_grad(grad_out, y, ctx.dim)
        return grad_x.to(ctx.dtype), None, None, None


def stored_probabilities(p: Tensor, format: Format) -> Tensor:
    """What is kept for p: under a ``Quantized`` format its root, for most probabilities are far
    below the largest one of their group, by which its steps are measured."""
    return p.sqrt() if isinstance(format, Quantized) else p


def read_probabilities(kept: Packed) -> Tensor:
    """p from what :func:`stored_probabilities` made."""
    value = kept.unpack()
    return value.square() if isinstance(laid(kept)[0].format, Quantized) else value


def softmax_grad(grad_out: Tensor, y: Tensor, dim: int) -> Tensor:
    """y * (g - sum(g y)): the gradient through y = softmax(x)."""
    weighted = grad_out * y
    return weighted - y * weighted.sum(dim, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Attended:
    """Attention's output from its operands."""

    sums_in_float32: ClassVar[bool] = True

    is_causal: bool
    scale: float | None
    enable_gqa: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, mask, 0.0, self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa
        )


class AttentionFunction(Function):
    """softmax(scale q k^T + mask) v, kept as q, k, v alone; backward computes it again.

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
        operands = keep(ctx, (q, format), (k, format), (v, format), exact=(mask, rng_state))
        dropout_p, *options = ctx.options
        if format.rebuild and dropout_p == 0:
            shape, dtype = output.shape, output.dtype
            offer(output, rebuilt(Attended(*options), *operands, mask, shape=shape, dtype=dtype))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        packed, (mask, rng_state) = kept(ctx)
        q, k, v = (t.unpack() for t in packed)
        dropout_p, is_causal, scale, enable_gqa = ctx.options
        mask_grad = ctx.needs_input_grad[3]
        dq, dk, dv, dmask = torch.ops.memtl.attention_grad(
            grad_out, q, k, v, mask, dropout_p, rng_state, is_causal, scale, enable_gqa, mask_grad
        )
        return dq, dk, dv, dmask if mask_grad else None, *(None,) * 6


class ExplicitAttentionFunction(Function):
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
        p = _probabilities(q, k, mask, is_causal, scale, enable_gqa)
        noise = F.dropout(torch.ones_like(p), dropout_p, True)
        with torch.autocast(q.device.type, enabled=False):
            out = (p * noise) @ _expand_heads(v, q, enable_gqa).to(p.dtype)
        return in_dtype(out, q.dtype), *Bits().pack(noise != 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.dropout_p, is_causal, scale, ctx.enable_gqa, format = inputs
        _, bits = output
        constant(ctx, bits)
        ctx.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        ctx.mask_shape = None if mask is None else mask.shape
        p = _probabilities(q, k, mask, is_causal, scale, ctx.enable_gqa).to(q.dtype)
        keep(
            ctx,
            (q, format),
            (k, format),
            (v, format),
            (stored_probabilities(p, format), format),
            (bits, Dense()),
        )

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _bits):
        (q_, k_, v_, p_, bits), _ = kept(ctx)
        q, k, v, p = *(t.unpack() for t in (q_, k_, v_)), read_probabilities(p_)
        k, v = _expand_heads(k, q, ctx.enable_gqa), _expand_heads(v, q, ctx.enable_gqa)

        def dropped(x: Tensor) -> Tensor:
            if ctx.dropout_p == 0:
                return x
            return Bits().apply(
                bits.tensors, x, 1 / (1 - ctx.dropout_p) if ctx.dropout_p < 1 else 0.0
            )

        dv = dropped(p).transpose(-2, -1) @ grad_out
        ds = softmax_grad(dropped(grad_out @ v.transpose(-2, -1)), p, -1)
        dq = (ds @ k * ctx.scale).sum_to_size(q_.shape)
        dk = _sum_heads(ds.transpose(-2, -1) @ q * ctx.scale, k_.shape, ctx.enable_gqa)
        dv = _sum_heads(dv, v_.shape, ctx.enable_gqa)
        dmask = ds.sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dmask, *(None,) * 5


def _probabilities(q, k, mask, is_causal, scale, enable_gqa) -> Tensor:
    """Operation by operation what torch's math attention does, to match it bit for bit: float32
    inside, sqrt(scale) on both sides, and rows without any allowed entry become zeros."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(scale))
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        k = _expand_heads(k, q, enable_gqa).to(wide)
        scores = (q.to(wide) * math.copysign(root, scale)) @ (k.transpose(-2, -1) * root)
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        elif mask is not None:
            scores = scores + mask
        return torch.ops.aten._safe_softmax(scores, -1)


def _expand_heads(t: Tensor, q: Tensor, enable_gqa: bool) -> Tensor:
    """Repeat key or value heads to q's, for grouped-query attention."""
    return t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) if enable_gqa else t


def _sum_heads(grad: Tensor, shape: torch.Size, enable_gqa: bool) -> Tensor:
    """The gradient of a key or value of that shape, from that of the expanded one."""
    if enable_gqa:
        grad = grad.unflatten(-3, (shape[-3], -1)).sum(-3)
    return grad.sum_to_size(shape)
