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


def shape_only(like: Tensor, shape: Sequence[int], channels_last: bool = False) -> Tensor:
    """A tensor of that shape, for operators that read but the shape and the layout.

    Its memory is never touched. (An expanded number would be copied out by the operator.)
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    layout = formats.get(len(shape), torch.contiguous_format)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


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
    weight = shape_only(grad_out, weight_size)
    grad = convolution_backward(grad_out, x, weight, geometry, [False, True, False])[1]
    return grad.to(torch.promote_types(grad_out.dtype, torch.float32))
