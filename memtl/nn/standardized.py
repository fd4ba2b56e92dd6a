"""Convolutions with standardised weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional
from ..autograd.weights import standardized
from ..storage import Dense, Format
from .layers import Layer, layer


class StandardizedConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a standardised weight (Qiao et al., "Weight Standardization", 2019):
    (w - mean) / (std + eps), by output channel, std unbiased.

    Args:
        eps: added to the deviation.
        the others: as of ``nn.Conv2d``.

    Shape:
        x [B, C, H, W] or [C, H, W] -> [B, O, H', W'] or [O, H', W'].

    Raises:
        ValueError: an output channel has one element, which has no deviation; or ``eps`` is not
            positive.

    Memory: of the standardisation none: backward makes the weight again from the parameter. The
    input is kept by reference, as torch does, if the weight trains; converted, in the format of the
    role "convolution". Under torch.compile and inside checkpoints, which own what is saved, the
    standardised weight is a tensor as any other.
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < 2:
            raise ValueError(
                "StandardizedConv2d: each output channel needs two elements at least, got a weight "
                f"{list(self.weight.shape)}"
            )
        if not eps > 0:  # a constant channel would be 0 / 0
            raise ValueError(f"StandardizedConv2d: eps must be positive, got {eps}")
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, Dense())

    def convolve(self, input: Tensor, format: Format) -> Tensor:
        """The forward, with the input kept in ``format``."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = functional.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        weight = standardized(self.weight, self.eps)
        return functional.conv2d(
            input, weight, self.bias, self.stride, padding, self.dilation, self.groups,
            format=format,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


@layer("convolution", "memtl.nn.standardized.StandardizedConv2d")
class StandardizedConv2dLayer(Layer):
    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.memtl_format)
