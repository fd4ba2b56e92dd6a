"""The gradient of a weight that is pruned: zero where the weight is."""

from __future__ import annotations

import torch
from torch import Tensor

from .keep import Function


class PrunedGradient(Function):
    """``grad`` where the bit is set, else 0, whatever it was there (NaN too); linear, so that it
    has derivatives of every order. Memory: a reference to the bits."""

    @staticmethod
    def forward(grad: Tensor, bits: Tensor) -> Tensor:
        return torch.ops.memtl.bits_apply(grad, bits, 1.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad_out):
        return PrunedGradient.apply(grad_out, *ctx.saved_tensors), None
