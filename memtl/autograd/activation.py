"""Elementwise functions with a curve: backward needs the derivative, a number in a known range, or
the input, which tells the output too.

Everything works in place as well: what backward needs is then packed before x is overwritten, and
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

from ..storage import Format, Packed, Quantized, pack
from ..storage.outline import outlined
from ..storage.quantized import grouped
from ..storage.rebuilt import Permuted, laid, pack_as_laid, rebuilt
from .keep import Function, first_order, keep, kept, packed_once
from .share import offer, shared, sharing

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Activation:
    """An elementwise function with its parameters bound, its derivative, and bounds of that.

    ``forward(x, inplace)``. ``hidden``: a layer that keeps its input follows, as a rule: then x is
    kept for the derivative and for y at once; else the derivative, which is smaller and closer.

    ``of_input(grad_out, x)``, ``of_output(grad_out, y)``: the gradient of x by torch's own kernel,
    or operation by operation. The latter alone where torch keeps y; both where it does so in place.
    """

    forward: Callable[..., Tensor]
    derivative: Callable[[Tensor], Tensor]
    lo: float
    hi: float
    hidden: bool = False
    of_input: Callable[[Tensor, Tensor], Tensor] | None = None
    of_output: Callable[[Tensor, Tensor], Tensor] | None = None


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
        of_input=lambda g, x: aten.gelu_backward(g, x, approximate=approximate),
    )


def _gelu_new(x: Tensor) -> Tensor:  # transformers' NewGELUActivation, operation by operation
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _gelu_new_grad(g: Tensor, x: Tensor) -> Tensor:
    cube, root = 0.044715 * torch.pow(x, 3.0), math.sqrt(2.0 / math.pi)
    t = torch.tanh(root * (x + cube))
    inner = aten.tanh_backward(g * (0.5 * x), t) * root
    return g * (1.0 + t) * 0.5 + (inner + inner * 0.044715 * (3.0 * torch.pow(x, 2.0)))


def _gelu_written_out(forward: Callable[[Tensor], Tensor], root: float) -> Activation:
    """The tanh form as some models write it, with their own digits of sqrt(2 / pi)."""

    def derivative(x: Tensor) -> Tensor:
        t = torch.tanh(root * x * (1 + 0.044715 * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)

    def of_input(g: Tensor, x: Tensor) -> Tensor:  # in the order of autograd, sums too
        cube, scaled = 0.044715 * x, root * x
        factor = 1 + cube * x
        t = torch.tanh(scaled * factor)
        inner = aten.tanh_backward(g * (0.5 * x), t)
        outer = inner * scaled
        return outer * cube + outer * x * 0.044715 + inner * factor * root + g * (1 + t) * 0.5

    return Activation(_plain(forward), derivative, -0.13, 1.13, hidden=True, of_input=of_input)


def _gelu_fast(x: Tensor) -> Tensor:  # transformers' FastGELUActivation
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_bloom(x: Tensor) -> Tensor:  # its bloom_gelu_forward
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _gelu_bloom_derivative(x: Tensor) -> Tensor:  # of its bloom_gelu_back
    t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    slope = (1 - t * t) * (0.79788456 + 0.1070322243 * x * x)
    return 0.5 * x * slope + 0.5 * (1 + t)


def _silu_derivative(x: Tensor) -> Tensor:
    return aten.silu_backward(torch.ones_like(x), x)


def _quick_gelu_grad(g: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return g * s + aten.sigmoid_backward(g * x, s) * 1.702


def _exponential_linear(forward: Callable[..., Tensor], lo: float, hi: float, *constants: float):
    """``constants``: alpha, scale and input scale of torch's one backward."""

    def of(is_output: bool) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda g, t: aten.elu_backward(g, *constants, is_output, t)

    alone = constants[0] >= 0  # of a negative alpha y does not tell x
    return Activation(
        forward,
        lambda x: of(False)(torch.ones_like(x), x),
        lo,
        hi,
        of_input=of(False),
        of_output=of(True) if alone else None,
    )


def _elu(alpha: float = 1.0) -> Activation:
    forward = lambda x, inplace=False: F.elu(x, alpha, inplace)  # noqa: E731
    return _exponential_linear(forward, min(0.0, alpha), max(1.0, alpha), alpha, 1, 1)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _selu() -> Activation:
    forward = lambda x, inplace=False: F.selu(x, inplace)  # noqa: E731
    hi = SELU_ALPHA * SELU_SCALE
    return _exponential_linear(forward, 0.0, hi, SELU_ALPHA, SELU_SCALE, 1)


def _celu(alpha: float = 1.0) -> Activation:
    forward = lambda x, inplace=False: F.celu(x, alpha, inplace)  # noqa: E731
    single = torch.tensor(alpha, dtype=torch.float32, device="cpu").item()  # torch rounds it there
    return dataclasses.replace(
        _exponential_linear(forward, 0.0, 1.0, alpha, 1, 1 / single),
        derivative=lambda x: aten.elu_backward(torch.ones_like(x), alpha, 1, 1 / alpha, False, x),
    )


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    return Activation(
        _plain(lambda x: F.softplus(x, beta, threshold)),
        lambda x: aten.softplus_backward(torch.ones_like(x), x, beta, threshold),
        0.0,
        1.0,
        of_input=lambda g, x: aten.softplus_backward(g, x, beta, threshold),
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
    "gelu_new": lambda: dataclasses.replace(
        _gelu("tanh"), forward=_plain(_gelu_new), of_input=_gelu_new_grad
    ),
    "gelu_fast": lambda: _gelu_written_out(_gelu_fast, 0.7978845608),
    "gelu_bloom": lambda: Activation(
        _plain(_gelu_bloom),
        _gelu_bloom_derivative,
        -0.13,
        1.13,
        hidden=True,
        of_input=lambda g, x: _gelu_bloom_derivative(x) * g,
    ),
    "quick_gelu": lambda: Activation(
        _plain(lambda x: x * torch.sigmoid(1.702 * x)),
        lambda x: _silu_derivative(1.702 * x),
        -0.1,
        1.1,
        hidden=True,
        of_input=_quick_gelu_grad,
    ),
    "silu": lambda: Activation(
        lambda x, inplace=False: F.silu(x, inplace),
        _silu_derivative,
        -0.1,
        1.1,
        hidden=True,
        of_input=aten.silu_backward,
    ),
    "mish": lambda: Activation(
        lambda x, inplace=False: F.mish(x, inplace),
        lambda x: aten.mish_backward(torch.ones_like(x), x),
        -0.1132,
        1.0886,
        hidden=True,
        of_input=aten.mish_backward,
    ),
    "hardswish": lambda: Activation(
        lambda x, inplace=False: F.hardswish(x, inplace),
        lambda x: aten.hardswish_backward(torch.ones_like(x), x),
        -0.5,
        1.5,
        hidden=True,
        of_input=aten.hardswish_backward,
    ),
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "softplus": _softplus,
    "tanh": lambda: Activation(
        _methods(torch.tanh, Tensor.tanh_),
        _tanh_derivative,
        0.0,
        1.0,
        of_output=aten.tanh_backward,
    ),
    "sigmoid": lambda: Activation(
        _methods(torch.sigmoid, Tensor.sigmoid_),
        _sigmoid_derivative,
        0.0,
        0.25,
        of_output=aten.sigmoid_backward,
    ),
    "logsigmoid": lambda: Activation(
        _plain(F.logsigmoid),
        lambda x: torch.sigmoid(-x),
        0.0,
        1.0,
        of_input=lambda g, x: aten.log_sigmoid_backward(g, x, aten.log_sigmoid_forward(x)[1]),
    ),
}

# What the fused operators of torch.ops.memtl have of them: a tanh form as good as another.
FUSED = {name: name for name in ("gelu", "gelu_tanh", "silu", "quick_gelu", "hardswish", "mish")}
FUSED |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_bloom"), "gelu_tanh")


def activation(name: str, *parameters: float) -> Activation:
    """The named function with its parameters."""
    return ACTIVATIONS[name](*parameters)


def derivative_format(act: Activation, format: Quantized) -> Quantized:
    """The fixed-range code for an activation's derivative, of the bits that ``format`` says."""
    return Quantized(bits=format.bits, range=(act.lo, act.hi), seed=format.seed)


class Kept(NamedTuple):
    """x, or the derivative at x."""

    packed: Packed
    is_derivative: bool


def pack_activation(x: Tensor, name: str, parameters: tuple[float, ...], format: Format) -> Kept:
    """What backward needs of x: what stands for it already; else under a ``Quantized`` format the
    derivative, or x where y is to be rebuilt from it too; under any other format x."""
    if (source := shared(x, format)) is not None:
        return Kept(source, False)
    act = activation(name, *parameters)
    once = format.rebuild and act.hidden and sharing()
    if once or not isinstance(format, Quantized):
        return Kept(packed_once(x, format), False)
    return Kept(_pack_derivative(x, act, FUSED.get(name), format), True)


def _pack_derivative(x: Tensor, act: Activation, fused: str | None, format: Quantized) -> Packed:
    """From x in one pass where an operator knows the function."""
    code = derivative_format(act, format)
    if fused is None or x.dtype == torch.float64:
        return pack_as_laid(act.derivative(x), code)
    permuted = Permuted.like(x)
    given = x if permuted is None else permuted.laid(x)
    rounding = (code.bits, fused, act.lo, act.hi, code.seed)
    codes = torch.ops.memtl.quant_pack_derivative(*outlined(given), *rounding)
    packed = Packed(code, (codes,), given.shape, x.dtype)
    return packed if permuted is None else permuted.of(packed, x.shape)


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
        assert parts[0] is not None
        part, permuted = laid(parts[0])
        x, name = grouped(part), FUSED.get(self.name)
        if name is None or x is None or dtype == torch.float64:
            return None
        if x[-1] == 8 and name in ("gelu", "silu"):  # torch's are as fast
            return None
        y = torch.ops.memtl.quant_unpack_activation(*x, name, part.shape, dtype)
        return y if permuted is None else permuted.back(y)


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
            made = pack_activation(x, ctx.name, ctx.parameters, format)
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
            part, permuted = laid(saved)
            given = grad_out if permuted is None else permuted.laid(grad_out)
            ops, x, name, made = torch.ops.memtl, grouped(part), FUSED.get(ctx.name), None
            if ctx.derivative_kept:
                assert isinstance(part.format, Quantized) and part.format.range is not None
                code = (*part.tensors, part.format.bits, *part.format.range)
                made = ops.quant_apply_range(given, *code)
            elif x is not None and name is not None:
                made = ops.quant_activation_grad(given, *x, name)
            if made is not None:
                return made if permuted is None else permuted.back(made), *(None,) * 5
        value, act = saved.unpack(), activation(ctx.name, *ctx.parameters)
        if not ctx.derivative_kept:
            alike = value.dtype == grad_out.dtype and FUSED.get(ctx.name) == ctx.name
            if act.of_input is not None and alike:  # one call
                return act.of_input(grad_out, value), *(None,) * 5
            value = act.derivative(value)
        if value.dtype == grad_out.dtype:  # made just now
            return value.mul_(grad_out), *(None,) * 5
        return grad_out * value, *(None,) * 5


class ExactActivationFunction(Function):
    """:class:`ActivationFunction` under an exact format; the gradient is torch's, bit for bit.

    Memory: nothing where x can be rebuilt. Else a reference to x or, where torch keeps that, to y;
    a copy of x in place, as torch makes one. ``packed``: what stands for x, where anything does or
    x is overwritten.
    """

    @staticmethod
    def forward(x, name, parameters, format, inplace, packed):
        y = activation(name, *parameters).forward(x, inplace)
        return x if inplace else y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.name, ctx.parameters, format, ctx.inplace, packed = inputs
        if ctx.inplace:
            ctx.mark_dirty(x)
        if packed is None and keeps_output(activation(ctx.name, *ctx.parameters), ctx.inplace):
            keep(ctx, exact=(output,))
            return
        (packed,) = keep(ctx, (x if packed is None else packed, format))
        if format.rebuild:
            recipe = Applied(ctx.name, ctx.parameters)
            made = rebuilt(recipe, packed, shape=output.shape, dtype=output.dtype)
            offer(output, made, dirty=ctx.inplace)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        packed, exact = kept(ctx)
        act = activation(ctx.name, *ctx.parameters)
        if act.of_output is not None and keeps_output(act, ctx.inplace):
            y = exact[0] if exact else act.forward(packed[0].unpack())
            return act.of_output(grad_out, y), *(None,) * 5
        assert act.of_input is not None
        return act.of_input(grad_out, packed[0].unpack()), *(None,) * 5


def keeps_output(act: Activation, inplace: bool) -> bool:
    """Whether torch takes the gradient from y."""
    return act.of_output is not None and (inplace or act.of_input is None)


def pack_exactly(x: Tensor, act: Activation, format: Format, inplace: bool) -> Packed | None:
    """What stands for x already; else a copy where x is about to be overwritten and needed."""
    source = shared(x, format)
    if source is None and inplace and not keeps_output(act, inplace):
        return pack(x.clone(), format)
    return source


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
        if x.format.exact:
            return grad_out * (x.unpack() * 2), None  # torch's order
        return grad_out * x.unpack() * 2, None
