"""Dropout, exact, in one bit an element."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..storage import Bits, Packed
from ..storage.rebuilt import rebuilt
from .keep import Function, constant, first_order, keep, kept
from .mask import as_laid
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
        return y, *Bits.like(y).pack(mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.p = inputs
        y, bits = output
        constant(ctx, bits)
        ctx.stride = y.stride()
        packed = Packed(Bits.like(y), (bits,), x.shape, torch.bool)
        keep(ctx, (packed, packed.format))
        offer_dropped(y, shared(x), packed, ctx.p, dirty=False)

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _bits):
        return dropped(grad_out, kept(ctx)[0][0], ctx.p, ctx.stride), None


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
        ctx.stride = x.stride()
        packed = Packed(Bits.like(x), (bits,), x.shape, torch.bool)
        keep(ctx, (packed, packed.format))
        offer_dropped(x, source, packed, ctx.p, dirty=True)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        return dropped(grad_out, kept(ctx)[0][0], ctx.p, ctx.stride), *(None,) * 4


def dropped(x: Tensor, mask: Packed, p: float, stride: tuple[int, ...] | None = None) -> Tensor:
    """x, or the gradient, through dropout: a product, as there, so that what is not finite is not
    lost where the mask is clear. ``stride``: of what was dropped; torch lays a gradient out so, or
    like the one given."""
    format = mask.format
    assert isinstance(format, Bits)
    if torch.compiler.is_compiling():
        return format.apply(mask.tensors, x, _scale(p, x))
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward(x, mask.unpack(), _scale(p, x))
    # Where all is finite, selecting is the product, in half the time.
    alike = stride in (None, x.stride()) and format.laid(x).is_contiguous()
    if alike and type(x) is Tensor and math.isfinite(x.sum().item()):
        y = format.apply(mask.tensors, x, _scale(p, x))
        return y if stride is None or format.order is None else as_laid(y, stride)
    noise = format.unpack(mask.tensors, mask.shape, x.dtype, _scale(p, x))
    if alike:
        return noise.mul_(x)
    return x * (noise if stride is None else as_laid(noise, stride))


def _scale(p: float, x: Tensor) -> float:
    """What F.dropout multiplies by. On a CPU that is noise of x's precision."""
    if p == 1:
        return 0.0
    if x.is_cuda or torch.compiler.is_compiling():
        return 1 / (1 - p)
    return _noise(p, x.dtype)


@functools.cache
def _noise(p: float, dtype: torch.dtype) -> float:
    with unset_fake_temporarily():  # a number, also where tensors have no data
        return torch.ones((), dtype=dtype).div_(1 - p).item()


@dataclasses.dataclass(frozen=True)
class Dropped:
    """x through dropout of probability p; the mask is packed."""

    p: float
    order: tuple[int, ...] | None = None

    def __call__(self, x: Tensor, bits: Tensor) -> Tensor:
        format = Bits(order=self.order)
        return dropped(x, Packed(format, (bits,), x.shape, torch.bool), self.p)


def offer_dropped(y: Tensor, source: Packed | None, mask: Packed, p: float, *, dirty: bool) -> None:
    """y can be made from what stands for x, and the packed mask."""
    if source is not None:
        assert isinstance(mask.format, Bits)
        recipe = Dropped(p, mask.format.order)
        made = rebuilt(recipe, source, *mask.tensors, shape=y.shape, dtype=y.dtype)
        offer(y, made, dirty=dirty)
