"""Elementwise activations: what backward needs is the derivative, a number in a known range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import Bits, Quantized
from .keep import first_order, keep, kept


@dataclasses.dataclass(frozen=True)
class Activation:
    """An elementwise function, its derivative, and bounds of that derivative."""

    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    lo: float
    hi: float


def _gelu_derivative(approximate: str) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)


def _gelu_new(x: Tensor) -> Tensor:  # transformers' NewGELUActivation, operation by operation
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _silu_derivative(x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(torch.ones_like(x), x)


# The derivative of GELU lies in [-.1290, 1.1290], tanh form included; that of SiLU, x * sigmoid(x),
# in [-.0999, 1.0999], and x * sigmoid(1.702 x) has the same one at 1.702 x.
ACTIVATIONS = {
    "gelu": Activation(F.gelu, _gelu_derivative("none"), -0.13, 1.13),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), _gelu_derivative("tanh"), -0.13, 1.13
    ),
    "gelu_new": Activation(_gelu_new, _gelu_derivative("tanh"), -0.13, 1.13),
    "quick_gelu": Activation(
        lambda x: x * torch.sigmoid(1.702 * x), lambda x: _silu_derivative(1.702 * x), -0.1, 1.1
    ),
    "silu": Activation(F.silu, _silu_derivative, -0.1, 1.1),
}


class ActivationFunction(torch.autograd.Function):
    """y = f(x) for a row of :data:`ACTIVATIONS`.

    Memory: under a ``Quantized`` format the derivative in a fixed-range code, numel * bits / 8
    bytes; under any other format x itself in that format, the derivative being taken in backward.
    """

    @staticmethod
    def forward(x, name, format):
        return ACTIVATIONS[name].forward(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.name, format = inputs
        activation = ACTIVATIONS[ctx.name]
        ctx.derivative_kept = isinstance(format, Quantized)
        if isinstance(format, Quantized):
            fixed = Quantized(format.bits, (activation.lo, activation.hi), format.seed)
            keep(ctx, (activation.derivative(x), fixed))
        else:
            keep(ctx, (x, format))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (saved,), _ = kept(ctx)
        value = saved.unpack()
        if not ctx.derivative_kept:
            value = ACTIVATIONS[ctx.name].derivative(value)
        return grad_out * value, None, None


class ReLUFunction(torch.autograd.Function):
    """y = max(x, 0), exact. Memory: one bit an element."""

    @staticmethod
    def forward(x):
        return F.relu(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        keep(ctx, (~(output <= 0), Bits()))  # not (output > 0): NaN lets its gradient through

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (mask,), _ = kept(ctx)
        return mask.format.apply(mask.tensors, grad_out)


class DropoutFunction(torch.autograd.Function):
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
        _, bits = output
        ctx.mark_non_differentiable(bits)
        ctx.save_for_backward(bits)

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _bits):
        scale = 1 / (1 - ctx.p) if ctx.p < 1 else 0.0
        return Bits().apply(ctx.saved_tensors, grad_out, scale), None
