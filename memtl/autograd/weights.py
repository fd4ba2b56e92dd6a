"""Weights that are made from something smaller or already there: not kept, but made again."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..storage.rebuilt import rebuilt
from .keep import Function, first_order, in_dtype, keep, kept
from .share import held, offer, sharing

LEVELS = 127  # codes are -127 ... 127
_SCALE_BITS = 17  # of a scale's significand: times a code it is exact in float32
_SMALLEST = 2.0**-100  # scale; far from where those bits would be lost


@dataclasses.dataclass(frozen=True)
class Scaled:
    """int8 codes [O, ...] times the scale [O] of each output channel."""

    dtype: torch.dtype

    def __call__(self, codes: Tensor, scale: Tensor) -> Tensor:
        return _scaled(codes, scale, self.dtype)


# Functions beside the recipes: torch 2.11 does not trace the call of an object made in the trace.


def _scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # In two steps: faster than the product of an int8 and a float32 tensor.
    return codes.to(scale.dtype).mul_(_by_output(scale, codes)).to(dtype)


def encoded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [O, ...] in 8 bits: codes, int8 [O, ...], and a scale for each output channel,
    float32 [O].

    Symmetric, to the nearest: |code * scale - weight| <= scale / 2, exactly. A scale is its
    channel's largest magnitude / 127, rounded up to 17 bits, so that code * scale is exact in
    float32 and encoding what was decoded in float32 gives the same codes and scales again.

    Raises:
        ValueError: a value is not finite, or beyond what codes and a float32 scale hold.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    most = wide.flatten(1).abs().amax(1)
    scale = _rounded_up(most / LEVELS).clamp_min(_SMALLEST).float()
    if not (most.isfinite() & (LEVELS * scale).isfinite()).all():
        raise ValueError("holds values that are not finite, or too large for 8 bits and a scale")
    step = _by_output(scale, wide).to(wide.dtype)
    codes = (wide / step).round_().clamp_(-LEVELS, LEVELS)
    off = wide - codes * step  # exact: where the quotient was rounded across a half
    codes += (off > step / 2).to(codes.dtype)
    codes -= (off < -step / 2).to(codes.dtype)
    return codes.clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def _rounded_up(t: Tensor) -> Tensor:
    """Positive numbers of float32 or float64, to ``_SCALE_BITS`` bits of significand."""
    integer, bits = (torch.int64, 53) if t.dtype == torch.float64 else (torch.int32, 24)
    unit = 1 << (bits - _SCALE_BITS)
    return ((t.view(integer) + (unit - 1)) & -unit).view(t.dtype)


def decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of these codes, for which they stand: backward keeps them in its place.

    Memory: none beside codes and scale.
    """
    weight = _scaled(codes, scale, dtype)
    if torch.is_grad_enabled() and sharing():
        offer(weight, rebuilt(Scaled(dtype), codes, scale, shape=weight.shape, dtype=dtype))
    return weight


def _by_output(t: Tensor, weight: Tensor) -> Tensor:
    """[O] laid along the first dimension of ``weight``."""
    return t.view(-1, *[1] * (weight.dim() - 1))


@dataclasses.dataclass(frozen=True)
class Standardized:
    """(w - mean) / (std + eps) of each output channel of w [O, ...]; std is unbiased."""

    eps: float

    def __call__(self, weight: Tensor) -> Tensor:
        return _standardized(weight, self.eps)


def _standardized(weight: Tensor, eps: float) -> Tensor:
    centred, std = _centred(weight)
    return in_dtype(centred / (std + eps), weight.dtype)  # in place would be a second name too


def _centred(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w - mean and std, at least in float32."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    std, mean = torch.std_mean(wide, tuple(range(1, wide.dim())), correction=1, keepdim=True)
    return wide - mean, std


class StandardizeFunction(Function):
    """:class:`Standardized`, with its exact gradient.

    With d = w - mean, s = std, r = 1 / (s + eps), g the gradient given and n the elements of a
    channel: r (g - mean(g)) - r^2 sum(g d) / ((n - 1) s) d; without the last term where s = 0.
    Memory: none; w is referenced where it trains, d and s are computed again.
    """

    @staticmethod
    def forward(weight, eps, need_weight):
        return _standardized(weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, ctx.eps, need_weight = inputs
        keep(ctx, exact=(weight if need_weight else None,))
        if sharing():
            made = rebuilt(
                Standardized(ctx.eps), held(weight), shape=output.shape, dtype=output.dtype
            )
            offer(output, made)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        _, (weight,) = kept(ctx)
        if weight is None:
            return None, None, None
        d, s = _centred(weight)
        g, dims = grad_out.to(d.dtype), tuple(range(1, d.dim()))
        r, per_channel = 1 / (s + ctx.eps), d[0].numel() - 1
        slope = (g * d).sum(dims, keepdim=True) * r * r / (per_channel * s)
        slope = slope.masked_fill(s == 0, 0)
        grad = r * (g - g.mean(dims, keepdim=True)) - slope * d
        return grad.to(weight.dtype), None, None


def standardized(weight: Tensor, eps: float) -> Tensor:
    """``weight`` [O, ...] standardised: of each output channel the mean 0, the deviation 1.

    Memory: none; a layer's backward makes it again from ``weight``, or from what that is made of.
    """
    if not torch.is_grad_enabled():
        return _standardized(weight, eps)
    return StandardizeFunction.apply(weight, eps, weight.requires_grad)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """w where the bit is set, else 0."""

    def __call__(self, weight: Tensor, bits: Tensor) -> Tensor:
        return torch.ops.memtl.bits_apply(weight, bits, 1.0)


class ChosenFunction(Function):
    """:class:`Chosen`, where the bits are those of the largest |scores|.

    The gradient goes straight through the choice: with g the gradient given, that of |scores| is
    g w, of pruned weights too, and so that of the scores g w sign(scores), 0 being positive. The
    weight is frozen: it has none. Memory: none; weight and scores, parameters, are referenced.
    """

    @staticmethod
    def forward(weight, scores, bits, need_scores):
        return Chosen()(weight, bits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, scores, bits, need_scores = inputs
        keep(ctx, exact=(weight, scores) if need_scores else (None, None))
        if sharing():
            offer(output, rebuilt(Chosen(), weight, bits, shape=output.shape, dtype=output.dtype))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        _, (weight, scores) = kept(ctx)
        if scores is None:
            return None, None, None, None
        slope = weight.to(scores.dtype) * grad_out
        return None, torch.where(scores < 0, -slope, slope), None, None


def chosen(weight: Tensor, scores: Tensor | None, bits: Tensor) -> Tensor:
    """``weight`` where its bit, uint8 [ceil(numel / 8)], is set, else 0; ``scores``, of its shape,
    have the gradient, if there are any.

    Memory: none; a layer's backward makes it again from ``weight`` and ``bits``.
    """
    if not torch.is_grad_enabled():
        return Chosen()(weight, bits)
    needed = scores is not None and scores.requires_grad
    return ChosenFunction.apply(weight, scores, bits, needed)
