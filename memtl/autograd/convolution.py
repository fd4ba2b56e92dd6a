"""Convolutions: the input is needed for the weight gradient alone, and is kept in any format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import Dense, Format, Packed, pack
from ..storage.convolution import (
    ConvGeometry,
    convolution_backward,
    library_weight_grad,
)
from ..storage.rebuilt import Rebuilt, rebuilt
from .keep import Blank, Function, first_order, keep, kept
from .share import held, offer_input, shared

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """The forward: torch's own function."""
    stride, padding, dilation, groups, transposed, output_padding = geometry
    if transposed:
        run = TRANSPOSED[geometry.dims]
        return run(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return CONVOLUTIONS[geometry.dims](x, weight, bias, stride, padding, dilation, groups)


def uses_each_input_once(kernel: Sequence[int], geometry: ConvGeometry) -> bool:
    """Whether this cuts x into patches, no two of which have an element in common."""
    stride, padding, dilation, groups, transposed, _ = geometry
    if transposed or groups > 1 or any(padding) or max(dilation) > 1:
        return False
    return all(k <= s for k, s in zip(kernel, stride, strict=True)) and max(stride) > 1


def _bias_grad(grad_out: Tensor) -> Tensor:
    return grad_out.sum((0, *range(2, grad_out.dim())))


@dataclasses.dataclass(frozen=True)
class Rows:
    """x [B, C, ...] from its rows as they were packed."""

    size: torch.Size
    channels_last: bool

    def __call__(self, rows: Tensor) -> Tensor:
        if not self.channels_last:
            return rows.view(self.size)
        batch, channels, *spatial = self.size
        return rows.view(batch, *spatial, channels).movedim(-1, 1)


def _rows(x: Tensor, channels_last: bool) -> Tensor:
    """x as [B, C H W], or in the order [B, H W C]."""
    return (x.movedim(1, -1) if channels_last else x).flatten(1)


def _shared_rows(x: Tensor, format: Format, channels_last: bool) -> Packed | None:
    """The rows of x, if another convolution has packed the same ones."""
    found = shared(x)
    if found is None or not isinstance(found.format, Rebuilt):
        return None
    part = found.format.parts[0]
    if part is None or found.format.recipe != Rows(x.shape, channels_last) or part.format != format:
        return None
    return Packed(part.format, found.tensors, part.shape, part.dtype)


class ConvolutionFunction(Function):
    """Any convolution, of 1 to 3 dimensions, grouped, dilated, transposed.

    Gradients of x and the bias are exact; the weight's is taken from the stored x. Memory: nothing
    if the weight does not train, else ``format.nbytes`` of x as [B, C H W], in the order in which
    it lies in memory; where the convolution cuts x into patches (:func:`uses_each_input_once`), of
    these as [B, patches, C p q]: what none of them covers, three quarters of the input of a 1x1
    convolution of stride 2, is not kept. The weight is referenced when x needs a gradient, or
    what it is made of (:func:`memtl.autograd.share.held`).
    """

    @staticmethod
    def forward(x, weight, bias, format, cast, geometry, need_x, need_weight):
        if cast is not None:
            weight = weight.to(cast)
            bias = None if bias is None else bias.to(cast)
        return convolve(x, weight, bias, geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, format, cast, ctx.geometry, need_x, need_weight = inputs
        ctx.x, ctx.weight_shape, ctx.weight_dtype = Blank.of(x), weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.patches = uses_each_input_once(weight.shape[2:], ctx.geometry)
        ctx.channels_last = is_channels_last(x)
        packed, ctx.rebuilt = None, False
        if need_weight:
            packed = _shared_rows(x, format, ctx.channels_last) if not ctx.patches else None
        if need_weight and packed is None:
            packed = shared(x, format)
            ctx.rebuilt = packed is not None
        if need_weight and packed is None and ctx.patches:
            packed = pack(cut_patches(x, weight.shape[2:], ctx.geometry.stride), format)
        elif need_weight and packed is None:
            packed = pack(_rows(x, ctx.channels_last), format)
            rows = Rows(x.shape, ctx.channels_last)
            offer_input(x, rebuilt(rows, packed, shape=x.shape, dtype=x.dtype))
        keep(ctx, (packed, format), (held(weight) if need_x else None, Dense()))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (x, weight), _ = kept(ctx)
        grad_x = grad_weight = grad_bias = None
        if weight is not None and ctx.needs_input_grad[0]:
            w = weight.unpack().to(grad_out.dtype)
            x_like, mask = ctx.x.make(grad_out.dtype), [True, False, False]
            grad_x = convolution_backward(grad_out, x_like, w, ctx.geometry, mask)[0]
        if x is not None and ctx.needs_input_grad[1]:
            if ctx.rebuilt:
                made = x.unpack(grad_out.dtype)
                channels_last = is_channels_last(made)
                grad_weight = library_weight_grad(
                    _rows(made, channels_last),
                    grad_out,
                    ctx.x.shape[1:],
                    ctx.weight_shape,
                    ctx.geometry,
                    channels_last,
                )
            elif ctx.patches:  # a linear layer on patches
                grad_weight = x.weight_grad(grad_out.flatten(2).transpose(1, 2))
                grad_weight = grad_weight.view(ctx.weight_shape)
            else:
                grad_weight = x.conv_weight_grad(
                    grad_out, ctx.x.shape[1:], ctx.weight_shape, ctx.geometry, ctx.channels_last
                )
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = _bias_grad(grad_out).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *(None,) * 5


class ExactConvolutionFunction(Function):
    """:class:`ConvolutionFunction` under an exact format: all gradients are those of torch's one
    call, bit for bit. Memory: a reference to x if the weight trains, else nothing; the weight is
    referenced when x needs a gradient."""

    @staticmethod
    def forward(x, weight, bias, format, cast, geometry, need_x, need_weight):
        return ConvolutionFunction.forward(
            x, weight, bias, format, cast, geometry, need_x, need_weight
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, format, ctx.cast, ctx.geometry, need_x, need_weight = inputs
        ctx.x, ctx.weight = Blank.of(x), Blank.of(weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        weight = held(weight) if need_x else None
        keep(ctx, (x if need_weight else None, format), (weight, Dense()))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (x, weight), _ = kept(ctx)
        x = ctx.x.make() if x is None else x.unpack()
        weight = ctx.weight.make() if weight is None else weight.unpack()
        stride, padding, dilation, groups, transposed, output_padding = ctx.geometry
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_out, x, weight.to(ctx.cast or weight.dtype),
            None if ctx.bias_dtype is None else [grad_out.shape[1]],
            stride, padding, dilation, transposed, output_padding, groups,
            list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *(None,) * 5


def cut_patches(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """x [B, C, H, W] -> [B, patches, C p q], of any spatial dimension; what no patch covers is left
    out."""
    dims = len(size)
    for i in range(dims):
        x = x.unfold(2 + i, size[i], stride[i])  # [B, C, h, w, p, q] in the end
    x = x.movedim(1, 1 + dims)  # [B, h, w, C, p, q]
    patches = math.prod(x.shape[1 : 1 + dims])
    return x.reshape(x.shape[0], patches, math.prod(x.shape[1 + dims :]))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x [B, C, ...] are the dimension that varies fastest in memory."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
