"""The weight gradient of a convolution from rows of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ConvGeometry(NamedTuple):
    """Everything about a convolution but its tensors; one number a spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.stride)


def convolution_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's gradients of x [B, C, ...], weight and bias, those that ``mask`` asks for."""
    return torch.ops.aten.convolution_backward(
        grad_out,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding,
        geometry.groups,
        mask,
    )


def library_weight_grad(
    x: Tensor,
    grad_out: Tensor,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    geometry: ConvGeometry,
    channels_last: bool,
) -> Tensor:
    """torch's weight gradient for dense rows x [B, n], at least float32; a row is a sample of
    ``input_size`` (C, ...), in the order (..., C) with ``channels_last``."""
    channels, *spatial = input_size
    if channels_last:
        x = x.view(x.shape[0], *spatial, channels).movedim(-1, 1)
    else:
        x = x.view(x.shape[0], channels, *spatial)
    weight = grad_out.new_empty(weight_size)  # not read
    grad = convolution_backward(grad_out, x, weight, geometry, [False, True, False])[1]
    return grad.to(torch.promote_types(grad_out.dtype, torch.float32))
