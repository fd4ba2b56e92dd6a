"""Activations, in place too; dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd.activation import (
    ActivationFunction,
    ExactActivationFunction,
    SquareFunction,
    activation,
    pack_activation,
    pack_exactly,
)
from ..autograd.dropout import DropoutFunction, InPlaceDropoutFunction
from ..autograd.mask import (
    MASKS,
    ExactPReLUFunction,
    MaskFunction,
    PReLUFunction,
    pack_mask,
)
from ..autograd.share import shared
from ..storage import Bits, Dense, Format
from .common import (
    FOUR_BITS,
    autocast_float32,
    check_format,
    check_tensors,
    needs,
    sizes,
)


def gelu(x: Tensor, approximate: str = "none", *, format: Format = FOUR_BITS) -> Tensor:
    """``F.gelu``, both forms.

    Under a ``Quantized`` format what is kept is the derivative, in a fixed-range code of that many
    bits; under any other format x itself.

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: ``approximate`` is neither ``"none"`` nor ``"tanh"``.

    Memory: numel * bits / 8 bytes, or ``format.nbytes(x)``.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _elementwise("gelu" if approximate == "none" else "gelu_tanh", x, format)


def gelu_new(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """The tanh form of GELU as transformers writes it out (GPT-2); see :func:`gelu`."""
    return _elementwise("gelu_new", x, format)


def gelu_fast(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """The tanh form as transformers' FastGELUActivation writes it out; see :func:`gelu`."""
    return _elementwise("gelu_fast", x, format)


def gelu_bloom(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """The tanh form as BLOOM writes it out; see :func:`gelu`."""
    return _elementwise("gelu_bloom", x, format)


def quick_gelu(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """x * sigmoid(1.702 x), the activation of CLIP; see :func:`gelu`."""
    return _elementwise("quick_gelu", x, format)


def silu(x: Tensor, inplace: bool = False, *, format: Format = FOUR_BITS) -> Tensor:
    """``F.silu``, x * sigmoid(x); see :func:`gelu`."""
    return _elementwise("silu", x, format, inplace=inplace)


def mish(x: Tensor, inplace: bool = False, *, format: Format = FOUR_BITS) -> Tensor:
    """``F.mish``, x * tanh(softplus(x)); see :func:`gelu`."""
    return _elementwise("mish", x, format, inplace=inplace)


def hardswish(x: Tensor, inplace: bool = False, *, format: Format = FOUR_BITS) -> Tensor:
    """``F.hardswish``, x * relu6(x + 3) / 6; see :func:`gelu`."""
    return _elementwise("hardswish", x, format, inplace=inplace)


def elu(
    x: Tensor, alpha: float = 1.0, inplace: bool = False, *, format: Format = FOUR_BITS
) -> Tensor:
    """``F.elu``; see :func:`gelu`. Derivatives of 1 are exact."""
    return _elementwise("elu", x, format, (float(alpha),), inplace)


def selu(x: Tensor, inplace: bool = False, *, format: Format = FOUR_BITS) -> Tensor:
    """``F.selu``; see :func:`gelu`."""
    return _elementwise("selu", x, format, inplace=inplace)


def celu(
    x: Tensor, alpha: float = 1.0, inplace: bool = False, *, format: Format = FOUR_BITS
) -> Tensor:
    """``F.celu``; see :func:`gelu`. Derivatives of 1 are exact."""
    return _elementwise("celu", x, format, (float(alpha),), inplace)


def softplus(
    x: Tensor, beta: float = 1.0, threshold: float = 20.0, *, format: Format = FOUR_BITS
) -> Tensor:
    """``F.softplus``; see :func:`gelu`."""
    check_tensors("softplus", x=x)
    return _elementwise("softplus", autocast_float32(x), format, (float(beta), float(threshold)))


def logsigmoid(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """``F.logsigmoid``; see :func:`gelu`."""
    return _elementwise("logsigmoid", x, format)


def tanh(x: Tensor, inplace: bool = False, *, format: Format = FOUR_BITS) -> Tensor:
    """``torch.tanh``; see :func:`gelu`."""
    return _elementwise("tanh", x, format, inplace=inplace)


def sigmoid(x: Tensor, inplace: bool = False, *, format: Format = FOUR_BITS) -> Tensor:
    """``torch.sigmoid``; see :func:`gelu`."""
    return _elementwise("sigmoid", x, format, inplace=inplace)


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``; its gradient is exact. Memory: one bit an element."""
    return _masked("relu", x, (), inplace)


def relu6(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu6``; its gradient is exact. Memory: one bit an element."""
    return _masked("relu6", x, (), inplace)


def hardtanh(
    x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """``F.hardtanh``; its gradient is exact. Memory: one bit an element.

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: ``min_val`` exceeds ``max_val``.
    """
    if min_val > max_val:
        raise ValueError(f"hardtanh: expected min_val <= max_val, got {min_val} and {max_val}")
    return _masked("hardtanh", x, (float(min_val), float(max_val)), inplace)


def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``; its gradient is exact. Memory: one bit an element."""
    return _masked("hardsigmoid", x, (), inplace)


def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``F.leaky_relu``; its gradient is exact. Memory: one bit an element."""
    return _masked("leaky_relu", x, (float(negative_slope),), inplace)


def threshold(x: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """``F.threshold``; its gradient is exact. Memory: one bit an element."""
    return _masked("threshold", x, (float(threshold), float(value)), inplace)


def square(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """``torch.square``, with x kept in ``format``. Memory: ``format.nbytes(x)``.

    Raises:
        TypeError: x is no dense floating-point tensor.
    """
    check_tensors("square", x=x)
    check_format("square", format)
    return SquareFunction.apply(x, format) if any(needs(x)) else torch.square(x)


def prelu(x: Tensor, weight: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """``F.prelu``; the gradient of x is exact, that of the weight is taken from min(x, 0), stored.

    Args:
        x: [B, C, ...], floating point.
        weight: [C] or [1].

    Raises:
        TypeError, ValueError: as :func:`memtl.functional.linear`.

    Memory: one bit an element, and ``format.nbytes(x)`` where the weight trains.
    """
    check_tensors("prelu", x=x)
    if weight is None:
        raise TypeError("prelu: weight must be a tensor, got NoneType")
    check_tensors("prelu", weight=weight)
    check_format("prelu", format)
    channels = x.shape[1] if x.dim() > 1 else 1
    if weight.dim() > 1 or weight.numel() not in (1, channels):
        raise ValueError(
            f"prelu: expected weight [1] or [{channels}] for x {sizes(x)}, got {sizes(weight)}"
        )
    need_x, need_weight = needs(x, weight)
    if not (need_x or need_weight):
        return torch.prelu(x, weight)
    if need_weight and format.exact:
        return ExactPReLUFunction.apply(x, weight, format)
    return PReLUFunction.apply(x, weight, format, need_x, need_weight)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``F.dropout``, drawing the same mask from the same generator; its gradient is exact.

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: p is outside [0, 1].

    Memory: one bit an element.
    """
    check_tensors("dropout", x=x)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    if not training or p == 0 or not any(needs(x)):
        return F.dropout(x, p, training, inplace)
    if not inplace:
        return DropoutFunction.apply(x, p)[0]
    with torch.no_grad():  # what F.dropout multiplies by, on every device
        noise = F.dropout(torch.ones_like(x), p, True, inplace=True)
        (bits,) = Bits.like(x).pack(noise != 0)
    return InPlaceDropoutFunction.apply(x, noise, bits, p, shared(x))


def _elementwise(
    name: str,
    x: Tensor,
    format: Format,
    parameters: tuple[float, ...] = (),
    inplace: bool = False,
) -> Tensor:
    check_tensors(name, x=x)
    check_format(name, format)
    if not any(needs(x)):
        return activation(name, *parameters).forward(x, inplace)
    made = None
    if inplace and torch.compiler.is_compiling():
        # Compiled code keeps less so. What is kept must not be x itself: it is about to change.
        kept = x.clone() if isinstance(format, Dense) else x
        return x.copy_(_elementwise(name, kept, format, parameters))
    if format.exact:
        with torch.no_grad():
            packed = pack_exactly(x, activation(name, *parameters), format, inplace)
        return ExactActivationFunction.apply(x, name, parameters, format, inplace, packed)
    if inplace:
        with torch.no_grad():
            kept = x.clone() if isinstance(format, Dense) else x
            made = pack_activation(kept, name, parameters, format)
    return ActivationFunction.apply(x, name, parameters, format, inplace, made)


def _masked(name: str, x: Tensor, parameters: tuple[float, ...], inplace: bool) -> Tensor:
    check_tensors(name, x=x)
    if not any(needs(x)):
        return MASKS[name](*parameters).forward(x, inplace)
    bits = None
    if inplace and torch.compiler.is_compiling():
        return x.copy_(_masked(name, x, parameters, False))  # compiled code keeps less so
    if inplace:
        with torch.no_grad():
            bits = pack_mask(x, name, parameters)
    return MaskFunction.apply(x, name, parameters, inplace, bits, shared(x))
