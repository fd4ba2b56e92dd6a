"""Pooling, and padding by reflection or repetition: exact, and (next to) nothing kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd.pooling import (
    ADAPTIVE_MAX_POOL,
    MAX_POOL,
    SHAPE_ONLY,
    AdaptiveMaxPoolFunction,
    ExtremeFunction,
    MaxPoolFunction,
    ShapeOnlyFunction,
)
from .common import check_tensors, needs, sizes

Numbers = int | Sequence[int]


def max_pool1d(
    x: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool1d``; see :func:`max_pool2d`."""
    return _max_pool("max_pool1d", 1, x, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d(
    x: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool2d``; its gradient is exact.

    Args:
        x: [B, C, H, W] or [C, H, W], floating point.

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: shapes do not fit.

    Memory: the place of the maximum in its window, 2, 4 or 8 bits an element of the result.
    """
    return _max_pool("max_pool2d", 2, x, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool3d(
    x: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool3d``; see :func:`max_pool2d`."""
    return _max_pool("max_pool3d", 3, x, kernel_size, stride, padding, dilation, ceil_mode)


def adaptive_max_pool1d(x: Tensor, output_size: Numbers) -> Tensor:
    """``F.adaptive_max_pool1d``; see :func:`adaptive_max_pool2d`."""
    return _adaptive_max_pool("adaptive_max_pool1d", 1, x, output_size)


def adaptive_max_pool2d(x: Tensor, output_size: Numbers) -> Tensor:
    """``F.adaptive_max_pool2d``; its gradient is exact.

    Memory: the index of the maximum in its plane, in 1, 2 or 4 bytes an element of the result.
    """
    return _adaptive_max_pool("adaptive_max_pool2d", 2, x, output_size)


def adaptive_max_pool3d(x: Tensor, output_size: Numbers) -> Tensor:
    """``F.adaptive_max_pool3d``; see :func:`adaptive_max_pool2d`."""
    return _adaptive_max_pool("adaptive_max_pool3d", 3, x, output_size)


def amax(x: Tensor, dim: Numbers, keepdim: bool = False) -> Tensor:
    """``torch.amax``; its gradient is exact, ties sharing it.

    Raises:
        TypeError: x is no dense floating-point tensor.

    Memory: one bit an element of x.
    """
    return _extreme("amax", x, dim, keepdim)


def amin(x: Tensor, dim: Numbers, keepdim: bool = False) -> Tensor:
    """``torch.amin``; see :func:`amax`."""
    return _extreme("amin", x, dim, keepdim)


def avg_pool1d(
    x: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """``F.avg_pool1d``; see :func:`avg_pool2d`."""
    _check("avg_pool1d", x, 1)
    (kernel,), (pad,) = _tuple(kernel_size, 1), _tuple(padding, 1)
    (step,) = (kernel,) if not stride else _tuple(stride, 1)
    flat = x.unsqueeze(-2)  # as torch does it
    return avg_pool2d(flat, (1, kernel), (1, step), (0, pad), ceil_mode, count_include_pad).squeeze(
        -2
    )


def avg_pool2d(
    x: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``F.avg_pool2d``; its gradient is exact. Memory: none (torch keeps x).

    Args:
        x: [B, C, H, W] or [C, H, W], floating point.

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: shapes do not fit.
    """
    return _avg_pool(
        "avg_pool2d", 2, x, kernel_size, stride, padding, ceil_mode, count_include_pad,
        divisor_override,
    )  # fmt: skip


def avg_pool3d(
    x: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``F.avg_pool3d``; see :func:`avg_pool2d`."""
    return _avg_pool(
        "avg_pool3d", 3, x, kernel_size, stride, padding, ceil_mode, count_include_pad,
        divisor_override,
    )  # fmt: skip


def adaptive_avg_pool1d(x: Tensor, output_size: Numbers) -> Tensor:
    """``F.adaptive_avg_pool1d``; see :func:`avg_pool2d`."""
    _check("adaptive_avg_pool1d", x, 1)
    (size,) = _tuple(output_size, 1)
    return adaptive_avg_pool2d(x.unsqueeze(-2), (1, size)).squeeze(-2)  # as torch does it


def adaptive_avg_pool2d(x: Tensor, output_size: Numbers | Sequence[int | None]) -> Tensor:
    """``F.adaptive_avg_pool2d``; see :func:`avg_pool2d`."""
    return _adaptive_avg_pool("adaptive_avg_pool2d", 2, x, output_size)


def adaptive_avg_pool3d(x: Tensor, output_size: Numbers | Sequence[int | None]) -> Tensor:
    """``F.adaptive_avg_pool3d``; see :func:`avg_pool2d`."""
    return _adaptive_avg_pool("adaptive_avg_pool3d", 3, x, output_size)


def pad(
    x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """``F.pad``; its gradient is exact. Memory: none (torch keeps x to reflect or replicate it).

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: a padding that does not fit, as ``F.pad`` says it.
    """
    check_tensors("pad", x=x)
    name = f"{mode}_pad{len(pad) // 2}d"
    if name not in SHAPE_ONLY or not any(needs(x)):
        return F.pad(x, pad, mode, value)
    return ShapeOnlyFunction.apply(x, name, (tuple(pad),))


def _max_pool(name, dims, x, kernel_size, stride, padding, dilation, ceil_mode) -> Tensor:
    _check(name, x, dims)
    if not any(needs(x)):
        return MAX_POOL[dims](x, kernel_size, stride, padding, dilation, ceil_mode)
    kernel = _tuple(kernel_size, dims)
    window = (kernel if not stride else _tuple(stride, dims), _tuple(padding, dims))
    return MaxPoolFunction.apply(x, kernel, *window, _tuple(dilation, dims), ceil_mode)[0]


def _extreme(name: str, x: Tensor, dim: Numbers, keepdim: bool) -> Tensor:
    check_tensors(name, x=x)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    smallest = name == "amin"
    if not any(needs(x)):
        return (torch.amin if smallest else torch.amax)(x, dims, keepdim)
    return ExtremeFunction.apply(x, dims, keepdim, smallest)


def _adaptive_max_pool(name, dims, x, output_size) -> Tensor:
    _check(name, x, dims)
    if not any(needs(x)):
        return ADAPTIVE_MAX_POOL[dims](x, output_size)
    return AdaptiveMaxPoolFunction.apply(x, output_size, dims)[0]


def _avg_pool(name, dims, x, kernel_size, stride, padding, ceil_mode, include, divisor) -> Tensor:
    _check(name, x, dims)
    kernel = _tuple(kernel_size, dims)
    step = kernel if not stride else _tuple(stride, dims)
    arguments = (kernel, step, _tuple(padding, dims), ceil_mode, include, divisor)
    if not any(needs(x)):
        return SHAPE_ONLY[name][0](x, *arguments)
    return ShapeOnlyFunction.apply(x, name, arguments)


def _adaptive_avg_pool(name, dims, x, output_size) -> Tensor:
    _check(name, x, dims)
    given = _tuple(output_size, dims)
    size = tuple(
        n if wanted is None else wanted for n, wanted in zip(x.shape[-dims:], given, strict=True)
    )
    if math.prod(size) == 1 or not any(needs(x)):  # a mean keeps nothing
        return SHAPE_ONLY[name][0](x, size)
    return ShapeOnlyFunction.apply(x, name, (size,))


def _check(name: str, x: Tensor, dims: int) -> None:
    check_tensors(name, x=x)
    if x.dim() not in (dims + 1, dims + 2):
        letters = ", ".join("DHW"[-dims:])
        raise ValueError(f"{name}: expected x [B, C, {letters}] or [C, {letters}], got {sizes(x)}")


def _tuple(value, dims: int) -> tuple:
    """One number a spatial dimension."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)
