"""Normalisations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd.channel_norm import (
    BatchNormFunction,
    GroupNormFunction,
    SyncBatchNormFunction,
)
from ..autograd.exact_norm import (
    ExactBatchNormFunction,
    ExactGroupNormFunction,
    ExactLayerNormFunction,
    group_norm_input,
)
from ..autograd.norm import (
    RMS_NORMS,
    LayerNormFunction,
    NormalizeFunction,
    RMSNormFunction,
    VectorNormFunction,
)
from ..storage import Format
from .common import (
    FOUR_BITS,
    autocast_float32,
    check_format,
    check_shape,
    check_tensors,
    needs,
    sizes,
)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    format: Format = FOUR_BITS,
) -> Tensor:
    """``F.layer_norm``, with the normalised input x-hat kept in ``format``.

    The gradients of x and of the weight are taken from it. Under an exact format x itself is kept,
    by reference, and gradients are torch's, bit for bit.

    Args:
        x: [..., *normalized_shape], floating point.
        weight, bias: of shape ``normalized_shape``, or None.

    Raises:
        TypeError, ValueError: as :func:`linear`.

    Memory: ``format.nbytes(x)`` and one number a row, two under an exact format.
    """
    check_tensors("layer_norm", x=x, weight=weight, bias=bias)
    shape = _check_normalized("layer_norm", x, normalized_shape, format)
    check_shape("layer_norm", "weight", weight, shape, x)
    check_shape("layer_norm", "bias", bias, shape, x)
    need_x, need_weight, need_bias = needs(x, weight, bias)
    if not (need_x or need_weight or need_bias):
        return F.layer_norm(x, shape, weight, bias, eps)
    function = ExactLayerNormFunction if format.exact else LayerNormFunction
    return function.apply(x, weight, bias, shape, eps, format, need_x, need_weight)[0]


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    format: Format = FOUR_BITS,
    style: str = "torch",
) -> Tensor:
    """``F.rms_norm``, with x / rms(x) kept in ``format``; see :func:`layer_norm`.

    ``style``: ``"llama"`` rounds as transformers' LlamaRMSNorm and its kin do (normalise in
    float32, cast, then multiply by the weight), ``"gemma"`` as GemmaRMSNorm (multiply by 1 +
    weight, then cast).
    """
    if style not in RMS_NORMS:
        raise ValueError(f"rms_norm: style must be one of {sorted(RMS_NORMS)}, got {style!r}")
    check_tensors("rms_norm", x=x, weight=weight)
    shape = _check_normalized("rms_norm", x, normalized_shape, format)
    check_shape("rms_norm", "weight", weight, shape, x)
    need_x, need_weight = needs(x, weight)
    if not (need_x or need_weight):
        return RMS_NORMS[style](x, weight, shape, eps)
    return RMSNormFunction.apply(x, weight, shape, eps, format, style, need_x, need_weight)


def _check_normalized(
    name: str, x: Tensor, normalized_shape: Sequence[int], format: Format
) -> tuple[int, ...]:
    check_format(name, format)
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"{name}: expected x [..., {', '.join(map(str, shape))}], got {sizes(x)}")
    return shape


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    format: Format = FOUR_BITS,
) -> Tensor:
    """``F.batch_norm``, running statistics included, with x-hat kept in ``format``.

    In training the gradients of x and of the weight are taken from x-hat. In evaluation that of x
    is exact, and x-hat is kept for the weight's alone. Under an exact format x itself is kept, by
    reference, gradients are torch's, bit for bit, and running statistics are referenced in
    evaluation, as torch does: changing them before backward is an error, but for a forward in
    training, which torch does not notice either.

    Args:
        x: [B, C, ...], floating point.
        running_mean, running_var, weight, bias: [C] or None.

    Raises:
        TypeError: an argument is no tensor, or sparse, or not of a real floating-point type.
        ValueError: shapes do not fit; one value a channel in training; no statistics in evaluation.

    Memory: ``format.nbytes(x)`` where it is needed, and one number a channel.
    """
    check_tensors("batch_norm", x=x, weight=weight, bias=bias)
    check_format("batch_norm", format)
    if x.dim() < 2:
        raise ValueError(f"batch_norm: expected x [B, C, ...], got {sizes(x)}")
    statistics = {"running_mean": running_mean, "running_var": running_var}
    for argument, t in ({"weight": weight, "bias": bias} | statistics).items():
        check_shape("batch_norm", argument, t, (x.shape[1],), x)
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"batch_norm: expected more than 1 value per channel when training, got {sizes(x)}"
        )
    if not training and (running_mean is None or running_var is None):
        raise ValueError("batch_norm: expected running_mean and running_var in evaluation")
    need_x, need_weight, need_bias = needs(x, weight, bias)
    if not (need_x or need_weight or need_bias) or x.numel() == 0:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    function = ExactBatchNormFunction if format.exact else BatchNormFunction
    return function.apply(
        x, weight, bias, running_mean, running_var, training, momentum, eps, format, need_x,
        need_weight,
    )[0]  # fmt: skip


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
    *,
    format: Format = FOUR_BITS,
) -> Tensor:
    """:func:`batch_norm` in training with the statistics of every process of ``group``.

    All of them call it, and call its backward. Gradients of the weight and bias are of this
    process's samples, as torch's SyncBatchNorm gives them.

    Args:
        x: [B, C, ...], floating point; B may differ from process to process.
        running_mean, running_var, weight, bias: [C] or None.
        group: a ``torch.distributed`` process group.

    Raises:
        TypeError, ValueError: as :func:`batch_norm`.

    Memory: as :func:`batch_norm`.
    """
    check_tensors("sync_batch_norm", x=x, weight=weight, bias=bias)
    check_format("sync_batch_norm", format)
    if x.dim() < 2:
        raise ValueError(f"sync_batch_norm: expected x [B, C, ...], got {sizes(x)}")
    given = {"weight": weight, "bias": bias}
    given |= {"running_mean": running_mean, "running_var": running_var}
    for argument, t in given.items():
        check_shape("sync_batch_norm", argument, t, (x.shape[1],), x)
    need_x, need_weight, _ = needs(x, weight, bias)
    return SyncBatchNormFunction.apply(
        x, weight, bias, running_mean, running_var, momentum, eps, group, format, need_x,
        need_weight,
    )[0]  # fmt: skip


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    format: Format = FOUR_BITS,
) -> Tensor:
    """``F.instance_norm``: :func:`batch_norm` of every sample on its own.

    Args:
        x: [B, C, ...], floating point.

    Raises:
        TypeError, ValueError: as :func:`batch_norm`.

    Memory: ``format.nbytes(x)``, and one number a sample and channel.
    """
    check_tensors("instance_norm", x=x, weight=weight, bias=bias)
    check_format("instance_norm", format)
    if x.dim() < 3:
        raise ValueError(f"instance_norm: expected x [B, C, ...], got {sizes(x)}")
    batch, channels = x.shape[:2]
    statistics = {"running_mean": running_mean, "running_var": running_var}
    for argument, t in ({"weight": weight, "bias": bias} | statistics).items():
        check_shape("instance_norm", argument, t, (channels,), x)
    if use_input_stats and math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"instance_norm: expected more than 1 spatial element when training, got {sizes(x)}"
        )
    if not any(needs(x, weight, bias)) or x.numel() == 0:
        return F.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )

    def repeated(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.repeat(batch)

    # As torch does it: samples times channels are the channels of a batch of one.
    mean, var = repeated(running_mean), repeated(running_var)
    flat = x.contiguous().view(1, batch * channels, *x.shape[2:])
    y = batch_norm(
        flat, mean, var, repeated(weight), repeated(bias), use_input_stats, momentum, eps,
        format=format,
    )  # fmt: skip
    for t, each in ((running_mean, mean), (running_var, var)):
        if t is not None and each is not None:
            with torch.no_grad():
                t.copy_(each.view(batch, channels).mean(0))
    return y.view(x.shape)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    format: Format = FOUR_BITS,
) -> Tensor:
    """``F.group_norm``, with x-hat kept in ``format``; see :func:`layer_norm`.

    Args:
        x: [B, C, ...], floating point; C is a multiple of ``num_groups``.
        weight, bias: [C] or None.

    Raises:
        TypeError, ValueError: as :func:`layer_norm`.

    Memory: ``format.nbytes(x)`` and one number a sample and group.
    """
    check_tensors("group_norm", x=x, weight=weight, bias=bias)
    check_format("group_norm", format)
    if x.dim() < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm: expected x [B, C, ...], C a multiple of {num_groups}, got {sizes(x)}"
        )
    check_shape("group_norm", "weight", weight, (x.shape[1],), x)
    check_shape("group_norm", "bias", bias, (x.shape[1],), x)
    need_x, need_weight, need_bias = needs(x, weight, bias)
    if not (need_x or need_weight or need_bias) or x.numel() == 0:
        return F.group_norm(x, num_groups, weight, bias, eps)
    x = autocast_float32(x)
    function = ExactGroupNormFunction if format.exact else GroupNormFunction
    x = group_norm_input(x) if format.exact else x
    return function.apply(x, weight, bias, num_groups, eps, format, need_x, need_weight)[0]


def normalize(
    x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, format: Format = FOUR_BITS
) -> Tensor:
    """``F.normalize`` in the Euclidean norm, with the result kept in ``format``.

    Raises:
        TypeError: x is no dense floating-point tensor.
        NotImplementedError: p is not 2.

    Memory: ``format.nbytes(x)`` and one number a row.
    """
    check_tensors("normalize", x=x)
    check_format("normalize", format)
    if p != 2:
        raise NotImplementedError(f"normalize: expected the Euclidean norm, p = 2, got {p}")
    if not any(needs(x)):
        return F.normalize(x, p, dim, eps)
    return NormalizeFunction.apply(autocast_float32(x), dim, eps, format)[0]


def vector_norm(
    x: Tensor, dim: int | Sequence[int], keepdim: bool = False, *, format: Format = FOUR_BITS
) -> Tensor:
    """``torch.linalg.vector_norm(x, 2, dim)``, with x kept in ``format``.

    Raises:
        TypeError: x is no dense floating-point tensor.

    Memory: ``format.nbytes(x)`` and the result.
    """
    check_tensors("vector_norm", x=x)
    check_format("vector_norm", format)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if not any(needs(x)):
        return torch.linalg.vector_norm(x, 2, dims, keepdim)
    return VectorNormFunction.apply(autocast_float32(x), dims, keepdim, format)
