"""Normalisations under an exact format: x itself is kept, by reference, and torch's own backward is
called on it. y is made from x again, by the call of the forward.

The other formats keep x-hat (:mod:`.norm`, :mod:`.channel_norm`), which is a new tensor.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..storage import Format, Packed
from ..storage.rebuilt import Recipe, rebuilt
from .keep import Blank, Function, constant, first_order, keep, kept
from .share import offer, sharing

aten = torch.ops.aten


def _offer(y: Tensor, recipe: Recipe, x: Packed | None, *rest: Tensor | None, format: Format):
    if format.rebuild and x is not None:
        offer(y, rebuilt(recipe, x, *rest, shape=y.shape, dtype=y.dtype))


@dataclasses.dataclass(frozen=True)
class LayerNormed:
    shape: tuple[int, ...]
    eps: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return torch.native_layer_norm(x, self.shape, weight, bias, self.eps)[0]


class ExactLayerNormFunction(Function):
    """Memory: where x or the weight needs a gradient a reference to x, mean and rstd, two numbers a
    row. Returns y, mean and rstd."""

    @staticmethod
    def forward(x, weight, bias, shape, eps, format, need_x, need_weight):
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.shape, eps, format, need_x, need_weight = inputs
        y, mean, rstd = output
        constant(ctx, mean, rstd)
        ctx.x, ctx.mean = Blank.of(x), Blank.of(mean)
        read = need_x or need_weight
        statistics = (mean, rstd) if read else (None, None)
        (packed,) = keep(ctx, (x if read else None, format), exact=(*statistics, weight, bias))
        _offer(y, LayerNormed(ctx.shape, eps), packed, weight, bias, format=format)

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _mean, _rstd):
        (x,), (mean, rstd, weight, bias) = kept(ctx)
        x = ctx.x.make() if x is None else x.unpack()
        mean, rstd = (ctx.mean.make() if t is None else t for t in (mean, rstd))
        grads = aten.native_layer_norm_backward(
            grad_out, x, ctx.shape, mean, rstd, weight, bias, list(ctx.needs_input_grad[:3])
        )
        return *grads, *(None,) * 5


@dataclasses.dataclass(frozen=True)
class BatchNormed:
    training: bool
    eps: float

    def __call__(self, x: Tensor, weight, bias, mean, var) -> Tensor:
        return _batch_norm(x, weight, bias, mean, var, self.training, 0.0, self.eps)[0]


def _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    """What F.batch_norm calls: y and what its backward wants; the kernel is chosen inside."""
    return torch._batch_norm_impl_index(
        x, weight, bias, running_mean, running_var, training, momentum, eps,
        torch.backends.cudnn.enabled,
    )  # fmt: skip


class ExactBatchNormFunction(Function):
    """Memory: where the weight needs a gradient, or x in training, a reference to x; in training
    mean and rstd, two numbers a channel. Running statistics are referenced in evaluation, and
    copied where y is rebuilt. Returns what torch's own function does."""

    @staticmethod
    def forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, format, need_x,
        need_weight,
    ):  # fmt: skip
        return _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, mean, var, ctx.training, _, ctx.eps, format, need_x, need_weight = inputs
        y, *saved, ctx.kernel = output
        constant(ctx, *saved)
        ctx.x = Blank.of(x)
        read = need_weight or (need_x and ctx.training)
        running = (None, None) if ctx.training else (mean, var)
        (packed,) = keep(ctx, (x if read else None, format), exact=(weight, *running, *saved))
        if packed is None or not (format.rebuild and sharing()):
            return
        if not ctx.training:  # a forward in training changes them, and not their versions
            if y.numel() <= 2 * mean.numel():
                return
            running = (mean.clone(), var.clone())
        _offer(y, BatchNormed(ctx.training, ctx.eps), packed, weight, bias, *running, format=format)

    @staticmethod
    @first_order
    def backward(ctx, grad_out, *_):
        (x,), (weight, mean, var, saved_mean, saved_var, reserved) = kept(ctx)
        x, mask = ctx.x.make() if x is None else x.unpack(), list(ctx.needs_input_grad[:3])
        statistics = (weight, mean, var, saved_mean, saved_var, ctx.training, ctx.eps, mask)
        if ctx.kernel == 0:  # torch's own: the other way in is not traced with symbolic sizes
            grads = aten.native_batch_norm_backward(grad_out, x, *statistics)
        else:
            grads = aten._batch_norm_impl_index_backward(
                ctx.kernel, x, grad_out, *statistics, reserved
            )
        return *grads, *(None,) * 8


@dataclasses.dataclass(frozen=True)
class GroupNormed:
    groups: int
    eps: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _group_norm(x, weight, bias, self.groups, self.eps)[0]


def _group_norm(x, weight, bias, groups, eps):
    batch, channels = x.shape[:2]
    return torch.native_group_norm(
        x, weight, bias, batch, channels, x.shape[2:].numel(), groups, eps
    )


class ExactGroupNormFunction(Function):
    """Memory: where x or the weight needs a gradient a reference to x, mean and rstd, two numbers a
    group. Returns y, mean and rstd. x is contiguous, in either memory format."""

    @staticmethod
    def forward(x, weight, bias, groups, eps, format, need_x, need_weight):
        return _group_norm(x, weight, bias, groups, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.groups, eps, format, need_x, need_weight = inputs
        y, mean, rstd = output
        constant(ctx, mean, rstd)
        ctx.x, ctx.mean = Blank.of(x), Blank.of(mean)
        read = need_x or need_weight
        statistics = (mean, rstd) if read else (None, None)
        (packed,) = keep(ctx, (x if read else None, format), exact=(*statistics, weight))
        _offer(y, GroupNormed(ctx.groups, eps), packed, weight, bias, format=format)

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _mean, _rstd):
        (x,), (mean, rstd, weight) = kept(ctx)
        x = ctx.x.make() if x is None else x.unpack()
        mean, rstd = (ctx.mean.make() if t is None else t for t in (mean, rstd))
        batch, channels = x.shape[:2]
        layout = torch.contiguous_format
        if not x.is_contiguous() and x.dim() in LAST and not x.is_cuda:
            layout = LAST[x.dim()]
        grads = aten.native_group_norm_backward(
            grad_out.contiguous(memory_format=layout), x, mean, rstd, weight, batch, channels,
            x.shape[2:].numel(), ctx.groups, list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        return *grads, *(None,) * 5


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def group_norm_input(x: Tensor) -> Tensor:
    """x as torch's group norm takes and keeps it: contiguous, on a CPU in either memory format."""
    if not x.is_cuda and x.dim() in LAST and x.is_contiguous(memory_format=LAST[x.dim()]):
        return x
    return x.contiguous()
