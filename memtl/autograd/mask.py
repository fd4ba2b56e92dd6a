"""Elementwise functions of two slopes: one bit tells which. In place too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import Bits, Packed
from ..storage.rebuilt import Rebuilt, laid, rebuilt
from .keep import Function, first_order, keep, kept
from .norm import Affine
from .share import offer


@dataclasses.dataclass(frozen=True)
class Mask:
    """An elementwise function whose derivative is ``on`` inside a mask, elsewhere ``off``.

    ``mask(x)``: packed. ``of_output``: it can be read off y as well as off x.
    ``rebuild(x, mask)``: y from an approximate x and the exact mask. ``ends``: where y is x inside,
    what it is outside: the first or, where there is a second, the nearer one. ``like_grad``: torch
    lays the gradient out like the one given, where that says how; else always like x.
    """

    forward: Callable[..., Tensor]
    mask: Callable[[Tensor], Tensor]
    rebuild: Callable[[Tensor, Tensor], Tensor]
    on: float = 1.0
    off: float = 0.0
    ends: tuple[float, float | None] | None = None
    of_output: bool = True
    like_grad: bool = False


def _inside(lo: float, hi: float | None) -> Callable[[Tensor], Tensor]:
    """The mask of what is neither <= lo nor >= hi."""

    def mask(x: Tensor) -> Tensor:  # bounds are compared in float32, as torch does
        wide = torch.promote_types(x.dtype, torch.float32)
        given = x if all(_short(n) for n in (lo, hi) if n is not None) else x.to(wide)
        return torch.ops.memtl.bits_pack_between(given, lo, hi)

    return mask


def _short(n: float) -> bool:
    """Whether every type holds n: else y is another number than the bound it was cut to."""
    mantissa, exponent = math.frexp(n)
    return n == 0 or (abs(exponent) <= 13 and (256 * mantissa).is_integer())


def _nearest_end(lo: float, hi: float) -> Callable[[Tensor, Tensor], Tensor]:
    """x where the mask is set, elsewhere the nearer one of two ends."""
    middle = (lo + hi) / 2
    return lambda x, mask: torch.where(mask, x, torch.where(x < middle, lo, hi).to(x.dtype))


# Comparisons are torch's own, negated where it negates them, and treat NaN as there; but for ReLU6
# and Hardtanh, where NaN lets its gradient through, and torch's choice varies with the place.
MASKS: dict[str, Callable[..., Mask]] = {
    "relu": lambda: Mask(
        lambda x, inplace=False: F.relu(x, inplace),
        _inside(0.0, None),
        lambda x, mask: torch.where(mask, x, 0),
        ends=(0.0, None),
    ),
    "relu6": lambda: Mask(
        lambda x, inplace=False: F.relu6(x, inplace),
        _inside(0.0, 6.0),
        _nearest_end(0.0, 6.0),
        ends=(0.0, 6.0),
        like_grad=True,
    ),
    "hardtanh": lambda lo, hi: Mask(
        lambda x, inplace=False: F.hardtanh(x, lo, hi, inplace),
        _inside(lo, hi),
        _nearest_end(lo, hi),
        ends=(lo, hi if lo < hi else None),
        of_output=_short(lo) and _short(hi),
        like_grad=True,
    ),
    "hardsigmoid": lambda: Mask(
        lambda x, inplace=False: F.hardsigmoid(x, inplace),
        lambda x: torch.ops.memtl.bits_pack((x > -3) & (x < 3)),
        lambda x, mask: _nearest_end(0.0, 1.0)(x / 6 + 0.5, mask),
        on=0.1666666716337204,  # 1 / 6 in float32, whatever x is in
        of_output=False,
        like_grad=True,
    ),
    "leaky_relu": lambda slope: Mask(
        lambda x, inplace=False: F.leaky_relu(x, slope, inplace),
        lambda x: torch.ops.memtl.bits_pack(x > 0),
        lambda x, mask: torch.where(mask, x, x * slope),
        off=slope,
        of_output=False,
    ),
    "threshold": lambda threshold, value: Mask(
        lambda x, inplace=False: F.threshold(x, threshold, value, inplace),
        _inside(threshold, None),
        lambda x, mask: torch.where(mask, x, value),
        ends=(value, None),
        of_output=False,
    ),
}


def pack_mask(x: Tensor, name: str, parameters: tuple[float, ...]) -> Tensor | None:
    """The mask as bits where only x, before it is overwritten, can tell it; else None."""
    mask = MASKS[name](*parameters)
    return None if mask.of_output else mask.mask(Bits.like(x).laid(x))


@dataclasses.dataclass(frozen=True)
class Masked:
    """f(x) for a row of :data:`MASKS`."""

    name: str
    parameters: tuple[float, ...]

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        return MASKS[self.name](*self.parameters).rebuild(x, mask)

    def decode(
        self, parts: Sequence[Packed | None], shape: torch.Size, dtype: torch.dtype
    ) -> Tensor | None:
        """Where y is x, or an end: in one pass where x is an affine map of x-hat in groups."""
        x, bits = parts
        ends = MASKS[self.name](*self.parameters).ends
        if ends is None or x is None or bits is None:
            return None
        assert isinstance(bits.format, Bits)
        if isinstance(x.format, Rebuilt) and isinstance(x.format.recipe, Affine):
            affine = x.format.split(x.tensors)
            order = None if affine[0] is None else laid(affine[0])[1]
            if bits.format.order == (None if order is None else order.order):
                made = x.format.recipe.decode(affine, shape, dtype, bits.tensors[0], ends)
                if made is not None:
                    return made
        if ends != (0.0, None):
            return None
        return bits.format.apply(bits.tensors, x.unpack(dtype))


@dataclasses.dataclass(frozen=True)
class Forward:
    """f(x) for a row of :data:`MASKS`, from an exact x."""

    name: str
    parameters: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return MASKS[self.name](*self.parameters).forward(x)


class MaskFunction(Function):
    """y = f(x) for a row of :data:`MASKS`, exact. Memory: one bit an element.

    ``bits``: the packed mask, made before where y does not tell it and x is overwritten.
    ``source``: what stood for x before, if anything; with the mask it then stands for y.
    """

    @staticmethod
    def forward(x, name, parameters, inplace, bits, source):
        y = MASKS[name](*parameters).forward(x, inplace)
        return x if inplace else y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.name, ctx.parameters, inplace, bits, source = inputs
        mask = MASKS[ctx.name](*ctx.parameters)
        if inplace:
            ctx.mark_dirty(x)
        format, ctx.stride = Bits.like(output), output.stride()
        if bits is None:
            bits = mask.mask(format.laid(output if mask.of_output else x))
        packed = Packed(format, (bits,), x.shape, torch.bool)
        keep(ctx, (packed, format))
        if source is not None:
            exact = source.format.exact
            recipe = (Forward if exact else Masked)(ctx.name, ctx.parameters)
            parts = (source,) if exact else (source, packed)
            made = rebuilt(recipe, *parts, shape=output.shape, dtype=output.dtype)
            offer(output, made, dirty=inplace)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (bits,), _ = kept(ctx)
        mask = MASKS[ctx.name](*ctx.parameters)
        if mask.off:
            sign = as_laid(bits.unpack(grad_out.dtype), ctx.stride)
            grad_x = torch.ops.aten.leaky_relu_backward(grad_out, sign, mask.off, False)
        else:
            grad_x = masked(grad_out, bits, mask, ctx.stride)
        return grad_x, *(None,) * 5


def masked(grad_out: Tensor, bits: Packed, mask: Mask, stride: tuple[int, ...]) -> Tensor:
    """grad_out * ``mask.on`` where the bit is set, else 0, laid out as torch does; ``stride`` is of
    what the mask was read from."""
    format = bits.format
    assert isinstance(format, Bits)
    alike = grad_out.stride() == stride or 1 not in grad_out.shape
    like_mask = not mask.like_grad or format.laid(grad_out).is_contiguous()
    if torch.compiler.is_compiling() or (alike and like_mask):
        grad_x = format.apply(bits.tensors, grad_out, mask.on)
        return grad_x if format.order is None else as_laid(grad_x, stride)
    inside = as_laid(bits.unpack(grad_out.dtype), stride)
    if not mask.like_grad:
        return torch.ops.aten.threshold_backward(grad_out, inside, 0.0)
    grad_x = torch.ops.aten.hardtanh_backward(grad_out, inside, 0.0, 2.0)
    return grad_x if mask.on == 1 else grad_x.mul_(mask.on)


def as_laid(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    """t with the strides of what it was packed from: those of a dimension of size 1 say nothing,
    but torch reads them."""
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, stride, strict=True))
    if 1 not in t.shape or reach != t.numel() or torch.compiler.is_compiling():
        return t
    return t.as_strided(t.shape, stride)


class ExactPReLUFunction(Function):
    """:class:`PReLUFunction` where w trains, under an exact format. Memory: a reference to x."""

    @staticmethod
    def forward(x, weight, format):
        return torch.prelu(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, format = inputs
        ctx.shape = weight.shape
        keep(ctx, (x, format), exact=(weight,))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (x,), (weight,) = kept(ctx)
        x = x.unpack()
        laid = per_channel(weight, grad_out.dim()).to(grad_out.dtype)
        grads = torch.ops.aten._prelu_kernel_backward(grad_out, x.to(grad_out.dtype), laid)
        grad_x, grad_weight = grads[0].to(x.dtype), grads[1]
        grad_weight = grad_weight.sum_to_size(laid.shape).reshape(ctx.shape)
        return grad_x, grad_weight.to(weight.dtype), None


class PReLUFunction(Function):
    """y = max(x, 0) + w min(x, 0), w one number or one a channel (dimension 1).

    The gradient of x is exact. Memory: one bit an element for it (and a reference to w), and
    ``format.nbytes(x)`` for min(x, 0) where w trains.
    """

    @staticmethod
    def forward(x, weight, format, need_x, need_weight):
        return torch.prelu(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, format, need_x, need_weight = inputs
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        negative = x.clamp_max(0) if need_weight else None
        positive, ctx.stride = x > 0 if need_x else None, x.stride()
        pairs = ((positive, Bits.like(x if positive is None else positive)), (negative, format))
        keep(ctx, *pairs, exact=(weight if need_x else None,))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (positive, negative), (weight,) = kept(ctx)
        grad_x = grad_weight = None
        if positive is not None and ctx.needs_input_grad[0]:
            scaled = grad_out * per_channel(weight, grad_out.dim()).to(grad_out.dtype)
            grad_x = torch.where(as_laid(positive.unpack(), ctx.stride), grad_out, scaled)
        if negative is not None and ctx.needs_input_grad[1]:
            wide = torch.promote_types(grad_out.dtype, torch.float32)
            product = grad_out.to(wide) * negative.unpack(wide)
            grad_weight = product.sum_to_size(per_channel_size(ctx.weight_shape, grad_out.dim()))
            grad_weight = grad_weight.reshape(ctx.weight_shape).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None


def per_channel_size(shape: torch.Size, dim: int) -> tuple[int, ...]:
    """The shape by which [C] is laid along dimension 1 of a tensor of ``dim`` dimensions."""
    if dim < 2 or shape.numel() == 1:
        return (1,) * dim
    return (1, shape.numel(), *(1,) * (dim - 2))


def per_channel(t: Tensor, dim: int) -> Tensor:
    """[C] laid along dimension 1."""
    return t.reshape(per_channel_size(t.shape, dim))
