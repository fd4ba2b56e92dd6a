"""Batch and group normalisation: x-hat is kept in any format, the statistics exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as torch_sync_batch_norm

from ..storage import Format, Packed
from ..storage.quantized import grouped, pack_normalized
from ..storage.rebuilt import Permuted
from .convolution import is_channels_last
from .keep import Function, constant, first_order, keep, kept
from .mask import per_channel
from .norm import Affine, offer_affine


class BatchNormFunction(Function):
    """y = x-hat * w + b over x [B, C, ...], x-hat = (x - mean) * rstd by channel.

    In training the statistics are the batch's; the bias gradient is exact. In evaluation they are
    constants: the gradient of x is exact too and needs rstd alone, and x-hat is kept only where w
    trains. Memory: ``format.nbytes(x)`` for x-hat, where needed, and rstd, one number a channel.
    Returns y, mean and rstd.
    """

    @staticmethod
    def forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, format, need_x,
        need_weight,
    ):  # fmt: skip
        # What F.batch_norm calls, for its statistics' sake; the kernel is chosen inside.
        y, mean, rstd, *_ = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, training, momentum, eps,
            torch.backends.cudnn.enabled,
        )  # fmt: skip
        if not training:
            mean, rstd = running_mean.clone(), torch.rsqrt(running_var + eps)
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, _, ctx.training, _, _, format, need_x, need_weight = inputs
        y, mean, rstd = output
        constant(ctx, mean, rstd)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, weight, bias))
        x_hat = None
        if need_weight or (need_x and ctx.training):
            x_hat = _by_channel(x, mean, rstd, format)
        (packed,) = keep(ctx, (x_hat, format), exact=(rstd, weight) if need_x else (None, None))
        offer_affine(y, packed, weight, bias, format, Affine(by_channel=True))

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _mean, _rstd):
        (x_hat,), (rstd, weight) = kept(ctx)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if ctx.training and (fused := _fused_grads(grad_out, x_hat, rstd, weight)) is not None:
            return *cast_needed(ctx, fused), *(None,) * 8
        wide = torch.promote_types(grad_out.dtype, torch.float32)
        grad_out = grad_out.to(wide)
        grads: tuple[Tensor | None, ...]
        if x_hat is None:  # evaluation: an affine map, whose slope is known
            slope = rstd if weight is None or rstd is None else rstd * weight
            grads = (
                grad_out * per_channel(slope.to(wide), grad_out.dim()) if need_x else None,
                None,
                grad_out.sum((0, *range(2, grad_out.dim()))) if need_bias else None,
            )
        else:
            x_hat = x_hat.unpack(wide)
            # x-hat is its own normalised form: mean 0, rstd 1; the true rstd is in the weight.
            zeros, ones = x_hat.new_zeros(x_hat.shape[1]), x_hat.new_ones(x_hat.shape[1])
            scale = ones if rstd is None else rstd.to(wide)
            scale = scale if weight is None else scale * weight.to(wide)
            grads = torch.ops.aten.native_batch_norm_backward(
                grad_out, x_hat, scale, zeros, ones, zeros, ones, ctx.training, 0.0,
                [need_x, need_weight, need_bias],
            )  # fmt: skip
        return *cast_needed(ctx, grads), *(None,) * 8


FUSED_INNER = 256  # elements of a plane from which the fused gradients are faster on a CPU


def _fused_grads(
    grad_out: Tensor, x_hat: Packed | None, rstd: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of x, weight and bias from codes; None where x-hat is not in groups with their
    own scale, or no gradient of x is asked for, or the plain way is faster or of another dtype."""
    codes, inner = grouped(x_hat), grad_out.shape[2:].numel()
    if codes is None or rstd is None or inner < (1 if grad_out.is_cuda else FUSED_INNER):
        return None
    if grad_out.dtype == torch.float64 or not grad_out.is_contiguous():
        return None
    return torch.ops.memtl.quant_channel_norm_grad(grad_out, *codes, rstd, weight, inner)


class SyncBatchNormFunction(Function):
    """:class:`BatchNormFunction` in training, with the statistics of all processes of a group.

    On CUDA the forward is that of torch's own SyncBatchNorm; torch has none for a CPU, where it is
    written out. Memory: as there. Returns y, mean, rstd and the number of values a channel has.
    """

    @staticmethod
    def forward(
        x, weight, bias, running_mean, running_var, momentum, eps, group, format, need_x,
        need_weight,
    ):  # fmt: skip
        if x.is_cuda:
            record = _Record()
            y = torch_sync_batch_norm.forward(
                record, x, weight, bias, running_mean, running_var, eps, momentum, group,
                dist.get_world_size(group),
            )  # fmt: skip
            _, _, mean, rstd, counts = record.saved
            return y, mean, rstd, counts.sum()
        wide = torch.promote_types(x.dtype, torch.float32)
        flat = x.to(wide).transpose(0, 1).flatten(1)
        count = flat.new_full((1,), flat.shape[1])
        sums = torch.cat((flat.sum(1), flat.square().sum(1), count))
        dist.all_reduce(sums, group=group)
        channels, total = x.shape[1], sums[-1]
        mean = sums[:channels] / total
        var = (sums[channels:-1] / total - mean.square()).clamp_min_(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        return y, mean, torch.rsqrt(var + eps), total

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, _, _, _, ctx.group, format, need_x, need_weight = inputs
        y, mean, rstd, total = output
        constant(ctx, mean, rstd, total)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, weight, bias))
        ctx.exact = format.exact
        if ctx.exact:  # x itself, by reference, and what makes x-hat of it
            read = need_x or need_weight
            keep(ctx, (x if read else None, format), exact=(rstd, weight, total, mean))
            return
        x_hat = None
        if need_x or need_weight:
            x_hat = _by_channel(x, mean, rstd, format)
        exact = (rstd, weight, total) if need_x else (None, None, None)
        (packed,) = keep(ctx, (x_hat, format), exact=exact)
        offer_affine(y, packed, weight, bias, format, Affine(by_channel=True))

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _mean, _rstd, _total):
        (x_hat,), (rstd, weight, total, *means) = kept(ctx)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(grad_out.dtype, torch.float32)
        grad_out = grad_out.to(wide)
        dims, others = grad_out.dim(), (0, *range(2, grad_out.dim()))
        grad_bias, grad_x, grad_weight = grad_out.sum(others), None, None
        if x_hat is not None:
            x_hat = x_hat.unpack(wide)
            if ctx.exact:
                x_hat = (x_hat - per_channel(means[0], dims)).mul_(per_channel(rstd, dims))
            grad_weight = (grad_out * x_hat).sum(others)
        if grad_weight is not None and rstd is not None and need_x:
            sums = torch.stack((grad_bias, grad_weight))  # of this process; a process needs all
            dist.all_reduce(sums, group=ctx.group)
            mean, projection = (per_channel(s / total, dims) for s in sums)
            slope = rstd.to(wide) if weight is None else rstd.to(wide) * weight.to(wide)
            grad_x = (grad_out - mean - x_hat * projection) * per_channel(slope, dims)
        return *cast_needed(ctx, (grad_x, grad_weight, grad_bias)), *(None,) * 8


def _by_channel(x: Tensor, mean: Tensor, rstd: Tensor, format: Format) -> Tensor | Packed:
    """x-hat, in float32 at least, or packed already, in the order in which x lies in memory."""
    permuted = Permuted.like(x) if is_channels_last(x) else None
    if permuted is None:
        packed = pack_normalized(x, mean, rstd, x.shape[2:].numel(), format)
    else:
        packed = pack_normalized(permuted.laid(x), mean, rstd, 1, format)
    if packed is not None:
        return packed if permuted is None else permuted.of(packed, x.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - per_channel(mean, x.dim())).mul_(per_channel(rstd, x.dim()))


class _Record:
    """Stands in for the context of torch's own function, to read what it would keep."""

    saved: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved = tensors


def cast_needed(ctx, grads: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """The gradients of the first inputs that are asked for, in those inputs' dtypes."""
    for grad, dtype, need in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False):
        yield grad.to(dtype) if need and grad is not None else None


class GroupNormFunction(Function):
    """y = x-hat * w + b over x [B, C, ...], x-hat = (x - mean) * rstd by sample and group.

    The bias gradient is exact. Memory: ``format.nbytes(x)`` for x-hat where x or the weight needs a
    gradient, and rstd, one number a group, where x does. Returns y, mean and rstd.
    """

    @staticmethod
    def forward(x, weight, bias, groups, eps, format, need_x, need_weight):
        batch, channels, *spatial = x.shape
        size = 1
        for n in spatial:
            size *= n
        return torch.native_group_norm(x, weight, bias, batch, channels, size, groups, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.groups, _, format, need_x, need_weight = inputs
        y, mean, rstd = output
        constant(ctx, mean, rstd)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, weight, bias))
        x_hat = None
        if need_x or need_weight:
            x_hat = pack_normalized(x, mean, rstd, x.shape[1:].numel() // ctx.groups, format)
            if x_hat is None:
                wide = torch.promote_types(x.dtype, torch.float32)
                x_hat = x.contiguous().to(wide).unflatten(1, (ctx.groups, -1))
                x_hat = ((x_hat - _by_group(mean, x_hat)) * _by_group(rstd, x_hat)).flatten(1, 2)
        (packed,) = keep(ctx, (x_hat, format), exact=(rstd, weight) if need_x else (None, None))
        offer_affine(y, packed, weight, bias, format, Affine(by_channel=True))

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _mean, _rstd):
        (x_hat,), (rstd, weight) = kept(ctx)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(grad_out.dtype, torch.float32)
        grad_out = grad_out.to(wide)
        if x_hat is None:
            grad_bias = grad_out.sum((0, *range(2, grad_out.dim()))).to(ctx.dtypes[2])
            return None, None, grad_bias, *(None,) * 5
        x_hat = x_hat.unpack(wide)
        batch, channels = x_hat.shape[:2]
        zeros = x_hat.new_zeros((batch, ctx.groups))
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
            grad_out.contiguous(), x_hat.contiguous(), zeros, torch.ones_like(zeros),
            None if weight is None else weight.to(wide), batch, channels,
            x_hat[0, 0].numel() if batch else 1, ctx.groups, [need_x, need_weight, need_bias],
        )  # fmt: skip
        if need_x:
            grouped = grad_x.unflatten(1, (ctx.groups, -1))
            grad_x = (grouped * _by_group(rstd, grouped)).flatten(1, 2)
        return *cast_needed(ctx, (grad_x, grad_weight, grad_bias)), *(None,) * 5


def _by_group(t: Tensor, like: Tensor) -> Tensor:
    """[B, G] laid over [B, G, C / G, ...]."""
    return t.reshape(*like.shape[:2], *(1,) * (like.dim() - 2)).to(like.dtype)
