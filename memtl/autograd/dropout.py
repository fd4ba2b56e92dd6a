"""Dropout, exact, in one bit an element."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import Bits, Packed
from ..storage.rebuilt import rebuilt
from .keep import Function, first_order, keep, kept
from .share import offer, shared


class DropoutFunction(Function):
    """y = x * mask / (1 - p), exact, drawing from torch's generator as F.dropout does.

    Memory: one bit an element. Returns y and the packed mask.
    """

    @staticmethod
    def forward(x, p):
        if x.is_cuda:
            y, mask = torch.native_dropout(x, p, True)
        else:
            # On a CPU F.dropout multiplies by noise that it draws like this.
            noise = F.dropout(torch.ones_like(x), p, True)
            y, mask = x * noise, noise != 0
        return y, *Bits().pack(mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.p = inputs
        y, bits = output
        ctx.mark_non_differentiable(bits)
        keep(ctx, (Packed(Bits(), (bits,), x.shape, torch.bool), Bits()))
        offer_dropped(y, shared(x), bits, ctx.p, dirty=False)

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _bits):
        return dropped(grad_out, kept(ctx)[0][0].tensors, ctx.p), None


class InPlaceDropoutFunction(Function):
    """x *= noise, the noise being mask / (1 - p), drawn before. Memory: one bit an element."""

    @staticmethod
    def forward(x, noise, bits, p, source):
        x.mul_(noise)
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, bits, ctx.p, source = inputs
        ctx.mark_dirty(x)
        keep(ctx, (Packed(Bits(), (bits,), x.shape, torch.bool), Bits()))
        offer_dropped(x, source, bits, ctx.p, dirty=True)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        return dropped(grad_out, kept(ctx)[0][0].tensors, ctx.p), *(None,) * 4


def dropped(x: Tensor, bits: tuple[Tensor, ...], p: float) -> Tensor:
    """x, or the gradient, through dropout."""
    return Bits().apply(bits, x, _scale(p, x))


def _scale(p: float, x: Tensor) -> float:
    """What F.dropout multiplies by. On a CPU that is noise of x's precision."""
    if p == 1:
        return 0.0
    if x.is_cuda or torch.compiler.is_compiling():
        return 1 / (1 - p)
    return _noise(p, x.dtype)


@functools.cache
def _noise(p: float, dtype: torch.dtype) -> float:
    return torch.ones((), dtype=dtype).div_(1 - p).item()


@dataclasses.dataclass(frozen=True)
class Dropped:
    """x through dropout of probability p; the mask is packed."""

    p: float

    def __call__(self, x: Tensor, bits: Tensor) -> Tensor:
        return dropped(x, (bits,), self.p)


def offer_dropped(y: Tensor, source: Packed | None, bits: Tensor, p: float, *, dirty: bool) -> None:
    """y can be made from what stands for x, and the packed mask."""
    if source is not None:
        made = rebuilt(Dropped(p), source, bits, shape=y.shape, dtype=y.dtype)
        offer(y, made, dirty=dirty)
