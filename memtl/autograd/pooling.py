"""Pooling and padding: backward needs the place of the maximum, or no more than shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import Bits, Dense, Format, Packed, Quantized
from .keep import Blank, Function, constant, first_order, keep, kept

aten = torch.ops.aten

MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
ADAPTIVE_MAX_POOL = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}
MAX_POOL_BACKWARD = {
    1: aten.max_pool2d_with_indices_backward,
    2: aten.max_pool2d_with_indices_backward,
    3: aten.max_pool3d_with_indices_backward,
}
ADAPTIVE_MAX_POOL_BACKWARD = {
    1: aten.adaptive_max_pool2d_backward,
    2: aten.adaptive_max_pool2d_backward,
    3: aten.adaptive_max_pool3d_backward,
}


class MaxPoolFunction(Function):
    """y = the maximum over windows of x [..., spatial], exact.

    Memory: the place of the maximum within its window, 2, 4 or 8 bits an element of y for windows
    of up to 3, 15 or 255 elements, else 4 bytes (torch keeps x, and 8 bytes an element of y).
    """

    @staticmethod
    def forward(x, kernel, stride, padding, dilation, ceil_mode):
        y, place = MAX_POOL[len(kernel)](
            x, kernel, stride, padding, dilation, ceil_mode, return_indices=True
        )
        window = (kernel, stride, padding, dilation)
        offset = _in_window(place, x.shape[-len(kernel) :], window)
        return y, *places_format(kernel).pack(offset.float())

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *window, ctx.ceil_mode = inputs
        y, places = output
        ctx.window, ctx.x = tuple(window), Blank.of(x)
        constant(ctx, places)
        format = places_format(window[0])
        keep(ctx, (Packed(format, (places,), y.shape, torch.float32), format))

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _places):
        (places,), _ = kept(ctx)
        dims = len(ctx.window[0])
        place = _in_plane(places.unpack().to(torch.int64), ctx.x.shape[-dims:], ctx.window)
        x, window = ctx.x.make(), ctx.window
        if dims == 1:  # torch's is a plane of one row
            x, grad_out, place = (t.unsqueeze(-2) for t in (x, grad_out, place))
            window = tuple((first, *w) for first, w in zip((1, 1, 0, 1), window, strict=True))
        grad_x = MAX_POOL_BACKWARD[dims](grad_out, x, *window, ctx.ceil_mode, place)
        return grad_x.squeeze(-2) if dims == 1 else grad_x, *(None,) * 5


def places_format(kernel: Sequence[int]) -> Format:
    """Whole numbers below the size of the window; on the levels of a fixed-range code, exactly."""
    # Fields by name, in whatever is compiled: torch 2.11 misplaces them, `rebuild` being inherited.
    for bits in (2, 3, 4, 8):
        if math.prod(kernel) <= 2**bits - 1:
            return Quantized(bits=bits, range=(0.0, 2.0**bits - 2))
    return Dense(dtype="fp32")


class AdaptiveMaxPoolFunction(Function):
    """y = the maximum over a grid of windows of x, exact.

    Memory: the index of the maximum in its plane, in the smallest integer type (torch keeps x, and
    8 bytes an element of y).
    """

    @staticmethod
    def forward(x, size, dims):
        y, place = ADAPTIVE_MAX_POOL[dims](x, size, return_indices=True)
        return y, place.to(smallest_integer(math.prod(x.shape[-dims:])))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.dims = inputs
        ctx.x = Blank.of(x)
        constant(ctx, output[1])
        keep(ctx, (output[1], Dense()))

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _place):
        (place,), _ = kept(ctx)
        x, place = ctx.x.make(), place.tensors[0].to(torch.int64)
        if ctx.dims == 1:
            x, grad_out, place = (t.unsqueeze(-2) for t in (x, grad_out, place))
        grad_x = ADAPTIVE_MAX_POOL_BACKWARD[ctx.dims](grad_out, x, place)
        return grad_x.squeeze(-2) if ctx.dims == 1 else grad_x, None, None


class ExtremeFunction(Function):
    """y = the largest (or smallest) element of x over ``dim``, exact; ties share the gradient.

    Memory: one bit an element of x (torch keeps x and y).
    """

    @staticmethod
    def forward(x, dim, keepdim, smallest):
        return (torch.amin if smallest else torch.amax)(x, dim, keepdim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, dim, ctx.keepdim, _ = inputs
        ctx.dims = sorted(d % x.dim() for d in dim)
        reached = _unreduced(output, ctx) == x
        keep(ctx, (reached, Bits.like(reached)))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (reached,), _ = kept(ctx)
        wide = torch.promote_types(grad_out.dtype, torch.float32)
        reached = reached.unpack()
        count = reached.sum(ctx.dims, keepdim=True).to(wide)
        share = (_unreduced(grad_out, ctx) / count).to(grad_out.dtype)
        return share * reached, None, None, None  # NaN where no element equals a NaN


def _unreduced(t: Tensor, ctx) -> Tensor:
    """A reduced tensor, its dimensions back in place with size 1."""
    if not ctx.keepdim:
        for dim in ctx.dims:
            t = t.unsqueeze(dim)
    return t


def smallest_integer(count: int) -> torch.dtype:
    """The smallest integer type that tells ``count`` things apart."""
    return next(
        (t for t in (torch.uint8, torch.int16, torch.int32) if count <= torch.iinfo(t).max + 1),
        torch.int64,
    )


def _starts(size: torch.Size, window, device) -> list[Tensor]:
    """Where the windows of an output [..., *size] begin, one broadcastable tensor a dimension."""
    _, stride, padding, _ = window
    starts = []
    for i, n in enumerate(size):
        start = torch.arange(n, device=device) * stride[i] - padding[i]
        starts.append(start.reshape(-1, *(1,) * (len(size) - 1 - i)))
    return starts


def _in_window(place: Tensor, plane: torch.Size, window) -> Tensor:
    """Indices in a plane -> indices in each one's window, both in row-major order."""
    kernel, _, _, dilation = window
    dims = len(kernel)
    starts = _starts(place.shape[-dims:], window, place.device)
    offset = torch.zeros_like(place)
    for i in range(dims):
        coordinate = place // math.prod(plane[i + 1 :]) % plane[i]
        offset = offset * kernel[i] + (coordinate - starts[i]) // dilation[i]
    return offset


def _in_plane(offset: Tensor, plane: torch.Size, window) -> Tensor:
    """The inverse of :func:`_in_window`."""
    kernel, _, _, dilation = window
    dims = len(kernel)
    starts = _starts(offset.shape[-dims:], window, offset.device)
    place = torch.zeros_like(offset)
    for i in range(dims):
        step = offset // math.prod(kernel[i + 1 :]) % kernel[i]
        place = place * plane[i] + starts[i] + step * dilation[i]
    return place


class ShapeOnlyFunction(Function):
    """Functions of :data:`SHAPE_ONLY`, whose backward needs the layout of x and no element.

    Exact. Memory: none (torch keeps x).
    """

    @staticmethod
    def forward(x, name, arguments):
        return SHAPE_ONLY[name][0](x, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.name, ctx.arguments = inputs
        ctx.x = Blank.of(x)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        x = ctx.x.make(grad_out.dtype)  # which autocast may have chosen
        return SHAPE_ONLY[ctx.name][1](grad_out, x, *ctx.arguments), None, None


def _pad(mode: str):
    return lambda x, padding: F.pad(x, padding, mode)


SHAPE_ONLY = {
    "avg_pool2d": (aten.avg_pool2d, aten.avg_pool2d_backward),
    "avg_pool3d": (aten.avg_pool3d, aten.avg_pool3d_backward),
    "adaptive_avg_pool2d": (
        F.adaptive_avg_pool2d,
        lambda grad, x, size: aten._adaptive_avg_pool2d_backward(grad, x),
    ),
    "adaptive_avg_pool3d": (
        F.adaptive_avg_pool3d,
        lambda grad, x, size: aten._adaptive_avg_pool3d_backward(grad, x),
    ),
    **{
        f"{mode}_pad{dims}d": (
            _pad(mode),
            getattr(aten, f"{torch_mode}_pad{dims}d_backward"),
        )
        for mode, torch_mode in (("reflect", "reflection"), ("replicate", "replication"))
        for dims in (1, 2, 3)
    },
}
"""Name -> forward(x, *arguments), and backward(grad_out, x or a blank, *arguments)."""
