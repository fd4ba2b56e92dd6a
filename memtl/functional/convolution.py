"""Convolutions of one to three dimensions, and transposed ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..autograd.convolution import ConvolutionFunction, ExactConvolutionFunction, convolve
from ..storage import Format
from ..storage.convolution import ConvGeometry
from .common import LINEAR, autocast, check_format, check_shape, check_tensors, needs, sizes

Numbers = int | Sequence[int]


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    format: Format = LINEAR,
) -> Tensor:
    """``F.conv1d``; see :func:`conv2d`."""
    return _convolution("conv1d", 1, x, weight, bias, stride, padding, dilation, groups, format)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    format: Format = LINEAR,
) -> Tensor:
    """``F.conv2d``, with x kept in ``format`` for the weight gradient.

    Args:
        x: [B, C, H, W] or [C, H, W], floating point, in any memory format.
        weight: [O, C / groups, p, q].
        bias: [O] or None.
        stride, padding, dilation, groups: as in ``F.conv2d``; padding may be "same" or "valid".
        format: how x is kept; the weight gradient is taken from it.

    Raises:
        TypeError: an argument is no tensor, or sparse, or not of a real floating-point type.
        ValueError: shapes do not fit.

    Memory: ``format.nbytes`` of x as [B, C H W], nothing if the weight needs no gradient. Where the
    kernel is no larger than the stride (a ViT's patches, a 1x1 convolution of stride 2) only what
    it covers is kept, as [B, patches, C p q].
    """
    return _convolution("conv2d", 2, x, weight, bias, stride, padding, dilation, groups, format)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    format: Format = LINEAR,
) -> Tensor:
    """``F.conv3d``; see :func:`conv2d`."""
    return _convolution("conv3d", 3, x, weight, bias, stride, padding, dilation, groups, format)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    format: Format = LINEAR,
) -> Tensor:
    """``F.conv_transpose1d``; see :func:`conv_transpose2d`."""
    return _convolution(
        "conv_transpose1d", 1, x, weight, bias, stride, padding, dilation, groups, format,
        output_padding,
    )  # fmt: skip


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    format: Format = LINEAR,
) -> Tensor:
    """``F.conv_transpose2d``, with x kept in ``format`` for the weight gradient.

    weight is [C, O / groups, p, q]; all else as in :func:`conv2d`.
    """
    return _convolution(
        "conv_transpose2d", 2, x, weight, bias, stride, padding, dilation, groups, format,
        output_padding,
    )  # fmt: skip


def conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    format: Format = LINEAR,
) -> Tensor:
    """``F.conv_transpose3d``; see :func:`conv_transpose2d`."""
    return _convolution(
        "conv_transpose3d", 3, x, weight, bias, stride, padding, dilation, groups, format,
        output_padding,
    )  # fmt: skip


def _convolution(
    name: str,
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
    format: Format,
    output_padding: Numbers | None = None,
) -> Tensor:
    """Any of them; ``output_padding`` is given for transposed ones."""
    check_tensors(name, x=x, weight=weight, bias=bias)
    check_format(name, format)
    transposed = output_padding is not None
    fits = x.dim() in (dims + 1, dims + 2) and weight.dim() == dims + 2 and groups > 0
    if fits:
        channels = x.shape[-dims - 1]
        fits = channels == (weight.shape[0] if transposed else weight.shape[1] * groups)
        fits = fits and (weight.shape[0] % groups == 0)
    if not fits:
        letters = " ".join("DHW"[-dims:])
        wanted = "[C, O / groups, ...]" if transposed else "[O, C / groups, ...]"
        raise ValueError(
            f"{name}: expected x [B, C, {letters.replace(' ', ', ')}] and weight {wanted} with "
            f"{groups} groups, got {sizes(x)} and {sizes(weight)}"
        )
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    check_shape(name, "bias", bias, (outputs,), x)
    if x.dim() == dims + 1:
        batched = _convolution(
            name, dims, x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, format,
            output_padding,
        )  # fmt: skip
        return batched.squeeze(0)
    kernel = tuple(weight.shape[2:])
    stride, dilation = _per_dim(name, stride, dims), _per_dim(name, dilation, dims)
    if padding == "same":
        x, padding = _pad_to_same(name, x, kernel, stride, dilation)
    elif padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        raise ValueError(f"{name}: padding must be numbers, 'same' or 'valid', got {padding!r}")
    geometry = ConvGeometry(
        stride,
        _per_dim(name, padding, dims),
        dilation,
        groups,
        transposed,
        _per_dim(name, output_padding or 0, dims),
    )
    need_x, need_weight, need_bias = needs(x, weight, bias)
    if not (need_x or need_weight or need_bias):
        return convolve(x, weight, bias, geometry)
    x, cast = autocast(x)
    function = ExactConvolutionFunction if format.exact else ConvolutionFunction
    return function.apply(x, weight, bias, format, cast, geometry, need_x, need_weight)


def _per_dim(name: str, value: Numbers, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    if len(value) == 1:
        return tuple(value) * dims
    if len(value) != dims:
        raise ValueError(f"{name}: expected one number or {dims}, got {tuple(value)}")
    return tuple(value)


def _pad_to_same(
    name: str, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """What torch does for padding="same": the odd zero goes to the end."""
    if any(s != 1 for s in stride):
        raise ValueError(f"{name}: padding 'same' needs stride 1, got {tuple(stride)}")
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [n for t in reversed(total) for n in (0, t % 2)])
    return x, tuple(t // 2 for t in total)
