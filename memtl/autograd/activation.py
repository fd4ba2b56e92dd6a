"""Elementwise activations: what backward needs is the derivative, a number in a known range; where
it takes two values only, one bit.

Everything works in place too: what backward needs is then packed before x is overwritten, and
handed to the Function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import Bits, Format, Packed, Quantized, pack
from ..storage.quantized import grouped
from ..storage.rebuilt import Rebuilt, rebuilt
from .keep import Function, first_order, keep, kept, packed_once
from .norm import Affine
from .share import offer, shared, sharing

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Activation:
    """An elementwise function with its parameters bound, its derivative, and bounds of that.

    ``forward(x, inplace)``. ``hidden``: a layer that keeps its input follows, as a rule: then x is
    kept for the derivative and for y at once; else the derivative, which is smaller and closer.
    """

    forward: Callable[..., Tensor]
    derivative: Callable[[Tensor], Tensor]
    lo: float
    hi: float
    hidden: bool = False


def _plain(forward: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """For a function that torch has no in-place form of."""
    return lambda x, inplace=False: x.copy_(forward(x)) if inplace else forward(x)


def _methods(out_of_place: Callable, in_place: Callable) -> Callable[..., Tensor]:
    return lambda x, inplace=False: (in_place if inplace else out_of_place)(x)


def _gelu(approximate: str) -> Activation:
    return Activation(
        _plain(lambda x: F.gelu(x, approximate=approximate)),
        lambda x: aten.gelu_backward(torch.ones_like(x), x, approximate=approximate),
        -0.13,
        1.13,
        hidden=True,
    )


def _gelu_new(x: Tensor) -> Tensor:  # transformers' NewGELUActivation, operation by operation
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _gelu_written_out(forward: Callable[[Tensor], Tensor], root: float) -> Activation:
    """The tanh form as some models write it, with their own digits of sqrt(2 / pi)."""

    def derivative(x: Tensor) -> Tensor:
        t = torch.tanh(root * x * (1 + 0.044715 * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)

    return Activation(_plain(forward), derivative, -0.13, 1.13, hidden=True)


def _gelu_fast(x: Tensor) -> Tensor:  # transformers' FastGELUActivation
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_bloom(x: Tensor) -> Tensor:  # its bloom_gelu_forward
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _silu_derivative(x: Tensor) -> Tensor:
    return aten.silu_backward(torch.ones_like(x), x)


def _elu(alpha: float = 1.0) -> Activation:
    return Activation(
        lambda x, inplace=False: F.elu(x, alpha, inplace),
        lambda x: aten.elu_backward(torch.ones_like(x), alpha, 1, 1, False, x),
        min(0.0, alpha),
        max(1.0, alpha),
    )


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _selu() -> Activation:
    return Activation(
        lambda x, inplace=False: F.selu(x, inplace),
        lambda x: aten.elu_backward(torch.ones_like(x), SELU_ALPHA, SELU_SCALE, 1, False, x),
        0.0,
        SELU_ALPHA * SELU_SCALE,
    )


def _celu(alpha: float = 1.0) -> Activation:
    return Activation(
        lambda x, inplace=False: F.celu(x, alpha, inplace),
        lambda x: aten.elu_backward(torch.ones_like(x), alpha, 1, 1 / alpha, False, x),
        0.0,
        1.0,
    )


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    return Activation(
        _plain(lambda x: F.softplus(x, beta, threshold)),
        lambda x: aten.softplus_backward(torch.ones_like(x), x, beta, threshold),
        0.0,
        1.0,
    )


def _tanh_derivative(x: Tensor) -> Tensor:
    return aten.tanh_backward(torch.ones_like(x), torch.tanh(x))


def _sigmoid_derivative(x: Tensor) -> Tensor:
    return aten.sigmoid_backward(torch.ones_like(x), torch.sigmoid(x))


# The derivative of GELU lies in [-.1290, 1.1290], tanh form included; that of SiLU, x * sigmoid(x),
# in [-.0999, 1.0999], and x * sigmoid(1.702 x) has the same one at 1.702 x; that of Mish in
# [-.1131, 1.0885]. A key's value makes the Activation from the function's parameters.
ACTIVATIONS: dict[str, Callable[..., Activation]] = {
    "gelu": lambda: _gelu("none"),
    "gelu_tanh": lambda: _gelu("tanh"),
    "gelu_new": lambda: dataclasses.replace(_gelu("tanh"), forward=_plain(_gelu_new)),
    "gelu_fast": lambda: _gelu_written_out(_gelu_fast, 0.7978845608),
    "gelu_bloom": lambda: _gelu_written_out(_gelu_bloom, 0.79788456),
    "quick_gelu": lambda: Activation(
        _plain(lambda x: x * torch.sigmoid(1.702 * x)),
        lambda x: _silu_derivative(1.702 * x),
        -0.1,
        1.1,
        hidden=True,
    ),
    "silu": lambda: Activation(
        lambda x, inplace=False: F.silu(x, inplace), _silu_derivative, -0.1, 1.1, True
    ),
    "mish": lambda: Activation(
        lambda x, inplace=False: F.mish(x, inplace),
        lambda x: aten.mish_backward(torch.ones_like(x), x),
        -0.1132,
        1.0886,
        hidden=True,
    ),
    "hardswish": lambda: Activation(
        lambda x, inplace=False: F.hardswish(x, inplace),
        lambda x: aten.hardswish_backward(torch.ones_like(x), x),
        -0.5,
        1.5,
        hidden=True,
    ),
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "softplus": _softplus,
    "tanh": lambda: Activation(_methods(torch.tanh, Tensor.tanh_), _tanh_derivative, 0.0, 1.0),
    "sigmoid": lambda: Activation(
        _methods(torch.sigmoid, Tensor.sigmoid_), _sigmoid_derivative, 0.0, 0.25
    ),
    "logsigmoid": lambda: Activation(_plain(F.logsigmoid), lambda x: torch.sigmoid(-x), 0.0, 1.0),
}

# What torch.ops.memtl.quant_activation_grad has of them: a tanh form as good as another.
FUSED = {name: name for name in ("gelu", "gelu_tanh", "silu", "quick_gelu", "hardswish", "mish")}
FUSED |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_bloom"), "gelu_tanh")


def activation(name: str, *parameters: float) -> Activation:
    """The named function with its parameters."""
    return ACTIVATIONS[name](*parameters)


def derivative_format(act: Activation, format: Quantized) -> Quantized:
    """The fixed-range code for an activation's derivative, of the bits that ``format`` says."""
    return Quantized(format.bits, (act.lo, act.hi), format.seed)


class Kept(NamedTuple):
    """x, or the derivative at x."""

    packed: Packed
    is_derivative: bool


def pack_activation(x: Tensor, act: Activation, format: Format) -> Kept:
    """What backward needs of x: what stands for it already; else under a ``Quantized`` format the
    derivative, or x where y is to be rebuilt from it too; under any other format x."""
    if (source := shared(x, format)) is not None:
        return Kept(source, False)
    once = format.rebuild and act.hidden and sharing()
    if once or not isinstance(format, Quantized):
        return Kept(packed_once(x, format), False)
    return Kept(pack(act.derivative(x), derivative_format(act, format)), True)


@dataclasses.dataclass(frozen=True)
class Applied:
    """f(x) for a row of :data:`ACTIVATIONS`."""

    name: str
    parameters: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return activation(self.name, *self.parameters).forward(x)

    def decode(
        self, parts: Sequence[Packed | None], shape: torch.Size, dtype: torch.dtype
    ) -> Tensor | None:
        """In one pass where x is in groups with their own scale."""
        x, name = grouped(parts[0]), FUSED.get(self.name)
        if name is None or x is None or dtype == torch.float64:
            return None
        if x[-1] == 8 and name in ("gelu", "silu"):  # torch's are as fast
            return None
        return torch.ops.memtl.quant_unpack_activation(*x, name, shape, dtype)


class ActivationFunction(Function):
    """y = f(x) for a row of :data:`ACTIVATIONS`.

    Memory: nothing where x can be rebuilt. Else, under a ``Quantized`` format the derivative in a
    fixed-range code, numel * bits / 8 bytes, or, where y is to be rebuilt, ``format.nbytes(x)`` for
    both; under any other format x itself in that format, the derivative being taken in backward. In
    place, ``made`` is what :func:`pack_activation` made before.
    """

    @staticmethod
    def forward(x, name, parameters, format, inplace, made):
        y = activation(name, *parameters).forward(x, inplace)
        return x if inplace else y  # the very x: torch.compile wants to see it returned

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.name, ctx.parameters, format, inplace, made = inputs
        if inplace:
            ctx.mark_dirty(x)
        else:
            made = pack_activation(x, activation(ctx.name, *ctx.parameters), format)
        packed, ctx.derivative_kept = made
        keep(ctx, (packed, format))
        if format.rebuild and not ctx.derivative_kept:
            recipe = Applied(ctx.name, ctx.parameters)
            made = rebuilt(recipe, packed, shape=output.shape, dtype=output.dtype)
            offer(output, made, dirty=inplace)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (saved,), _ = kept(ctx)
        if saved.dtype == grad_out.dtype != torch.float64:
            ops, x, name = torch.ops.memtl, grouped(saved), FUSED.get(ctx.name)
            if ctx.derivative_kept:
                code = (*saved.tensors, saved.format.bits, *saved.format.range)
                return ops.quant_apply_range(grad_out, *code), *(None,) * 5
            if x is not None and name is not None:
                return ops.quant_activation_grad(grad_out, *x, name), *(None,) * 5
        value = saved.unpack()
        if not ctx.derivative_kept:
            value = activation(ctx.name, *ctx.parameters).derivative(value)
        if value.dtype == grad_out.dtype:  # made just now
            return value.mul_(grad_out), *(None,) * 5
        return grad_out * value, *(None,) * 5


@dataclasses.dataclass(frozen=True)
class Mask:
    """An elementwise function whose derivative is ``on`` inside a mask, elsewhere ``off``.

    ``mask(x)``: packed. ``of_output``: it can be read off y as well as off x.
    ``rebuild(x, mask)``: y from an approximate x and the exact mask.
    """

    forward: Callable[..., Tensor]
    mask: Callable[[Tensor], Tensor]
    rebuild: Callable[[Tensor, Tensor], Tensor]
    on: float = 1.0
    off: float = 0.0
    of_output: bool = True


def _inside(lo: float, hi: float | None) -> Callable[[Tensor], Tensor]:
    """The mask of what is neither <= lo nor >= hi."""
    return lambda x: torch.ops.memtl.bits_pack_between(x, lo, hi)


def _nearest_end(lo: float, hi: float) -> Callable[[Tensor, Tensor], Tensor]:
    """x where the mask is set, elsewhere the nearer one of two ends."""
    middle = (lo + hi) / 2
    return lambda x, mask: torch.where(mask, x, torch.where(x < middle, lo, hi).to(x.dtype))


# Comparisons are torch's own, negated where it negates them: NaN lets its gradient through or not
# as there.
MASKS: dict[str, Callable[..., Mask]] = {
    "relu": lambda: Mask(
        lambda x, inplace=False: F.relu(x, inplace),
        _inside(0.0, None),
        lambda x, mask: torch.where(mask, x, 0),
    ),
    "relu6": lambda: Mask(
        lambda x, inplace=False: F.relu6(x, inplace),
        _inside(0.0, 6.0),
        _nearest_end(0.0, 6.0),
    ),
    "hardtanh": lambda lo, hi: Mask(
        lambda x, inplace=False: F.hardtanh(x, lo, hi, inplace),
        _inside(lo, hi),
        _nearest_end(lo, hi),
    ),
    "hardsigmoid": lambda: Mask(
        lambda x, inplace=False: F.hardsigmoid(x, inplace),
        lambda x: torch.ops.memtl.bits_pack((x > -3) & (x < 3)),
        lambda x, mask: _nearest_end(0.0, 1.0)(x / 6 + 0.5, mask),
        on=1 / 6,
        of_output=False,
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
        of_output=False,
    ),
}


def pack_mask(x: Tensor, name: str, parameters: tuple[float, ...]) -> Tensor | None:
    """The mask as bits where only x, before it is overwritten, can tell it; else None."""
    mask = MASKS[name](*parameters)
    return None if mask.of_output else mask.mask(x)


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
        """For a ReLU: in one pass where x is an affine map of x-hat in groups."""
        x, bits = parts
        if self.name != "relu" or x is None or bits is None:
            return None
        if isinstance(x.format, Rebuilt) and isinstance(x.format.recipe, Affine):
            affine = x.format.split(x.tensors)
            made = x.format.recipe.decode(affine, shape, dtype, bits.tensors[0])
            if made is not None:
                return made
        return Bits().apply(bits.tensors, x.unpack(dtype))


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
        if bits is None:
            bits = mask.mask(output if mask.of_output else x)
        packed = Packed(Bits(), (bits,), x.shape, torch.bool)
        keep(ctx, (packed, Bits()))
        if source is not None:
            recipe = Masked(ctx.name, ctx.parameters)
            made = rebuilt(recipe, source, packed, shape=output.shape, dtype=output.dtype)
            offer(output, made, dirty=inplace)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (bits,), _ = kept(ctx)
        mask = MASKS[ctx.name](*ctx.parameters)
        if mask.off:
            on, off = grad_out * mask.on, grad_out * mask.off
            grad_x = torch.where(bits.unpack(), on, off)
        else:
            grad_x = Bits().apply(bits.tensors, grad_out, mask.on)
        return grad_x, *(None,) * 5


class SquareFunction(Function):
    """y = x^2. Memory: ``format.nbytes(x)``."""

    @staticmethod
    def forward(x, format):
        return torch.square(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        keep(ctx, inputs)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (x,), _ = kept(ctx)
        return grad_out * x.unpack() * 2, None


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
        pairs = ((x > 0 if need_x else None, Bits()), (negative, format))
        keep(ctx, *pairs, exact=(weight if need_x else None,))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (positive, negative), (weight,) = kept(ctx)
        grad_x = grad_weight = None
        if positive is not None and ctx.needs_input_grad[0]:
            scaled = grad_out * per_channel(weight, grad_out.dim())
            grad_x = torch.where(positive.unpack(), grad_out, scaled)
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
        ctx.save_for_backward(bits)
        offer_dropped(y, shared(x), bits, ctx.p, dirty=False)

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _bits):
        return dropped(grad_out, ctx.saved_tensors, ctx.p), None


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
        ctx.save_for_backward(bits)
        offer_dropped(x, source, bits, ctx.p, dirty=True)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        return dropped(grad_out, ctx.saved_tensors, ctx.p), *(None,) * 4


def dropped(x: Tensor, bits: tuple[Tensor, ...], p: float) -> Tensor:
    """x, or the gradient, through dropout."""
    return Bits().apply(bits, x, 1 / (1 - p) if p < 1 else 0.0)


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
