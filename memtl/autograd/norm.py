"""Normalisations: the normalised input x-hat is kept in any format, one number a row exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import Format, Packed
from ..storage.quantized import grouped, pack_normalized
from ..storage.rebuilt import laid, rebuilt
from .keep import Function, constant, first_order, in_dtype, keep, kept
from .share import offer


@dataclasses.dataclass(frozen=True)
class Affine:
    """x-hat * w + b over the last dimensions or, ``by_channel``, over dimension 1; w + 1 where
    ``one_more``."""

    by_channel: bool = False
    one_more: bool = False

    def __call__(self, x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        weight, bias = self._laid(weight, x_hat), self._laid(bias, x_hat)
        if weight is None:
            return x_hat if bias is None else x_hat + bias
        weight = weight + 1 if self.one_more else weight
        return x_hat * weight if bias is None else torch.addcmul(bias, x_hat, weight)

    def decode(
        self,
        parts: Sequence[Packed | None],
        shape: torch.Size,
        dtype: torch.dtype,
        mask: Tensor | None = None,
        ends: tuple[float, float | None] = (0.0, None),
    ) -> Tensor | None:
        """In one pass where x-hat is in groups with their own scale; where ``mask``, packed, is
        clear the first of ``ends`` or, where there is a second, the nearer one."""
        assert parts[0] is not None
        part, permuted = laid(parts[0])
        x_hat, (weight, bias) = grouped(part), parts[1:]
        if x_hat is None or dtype == torch.float64:
            return None
        inner = shape[2:].numel() if self.by_channel else 1
        if permuted is not None:
            if not self.by_channel or permuted.order[-1] != 1:
                return None
            inner = 1  # channels last
        w, b = (None if p is None else p.unpack() for p in (weight, bias))
        if w is not None and self.one_more:
            w = w.float() + 1
        y = torch.ops.memtl.quant_unpack_affine(*x_hat, w, b, mask, inner, part.shape, dtype, *ends)
        return y if permuted is None else permuted.back(y)

    def _laid(self, t: Tensor | None, like: Tensor) -> Tensor | None:
        if t is None or not self.by_channel:
            return t
        return t.reshape(-1, *(1,) * (like.dim() - 2))


def offer_affine(
    y: Tensor,
    x_hat: Packed | None,
    weight: Tensor | None,
    bias: Tensor | None,
    format: Format,
    recipe: Affine,
) -> None:
    """y can be made from x-hat, where that is kept."""
    if format.rebuild and x_hat is not None:
        offer(y, rebuilt(recipe, x_hat, weight, bias, shape=y.shape, dtype=y.dtype))


class LayerNormFunction(Function):
    """y = x-hat * w + b, x-hat = (x - mean) * rstd over the last dimensions.

    The bias gradient is exact. Memory: ``format.nbytes(x)`` for x-hat where x or the weight needs a
    gradient, and rstd (one number a row) where x does. Returns y, mean and rstd.
    """

    @staticmethod
    def forward(x, weight, bias, shape, eps, format, need_x, need_weight):
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, shape, eps, format, need_x, need_weight = inputs
        y, mean, rstd = output
        constant(ctx, mean, rstd)
        ctx.shape = shape
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, weight, bias))
        x_hat = None
        if need_x or need_weight:
            x_hat = pack_normalized(x, mean, rstd, math.prod(shape), format)
            if x_hat is None:
                wide = torch.promote_types(x.dtype, torch.float32)
                x_hat = (x.contiguous().to(wide) - mean).mul_(rstd)
        exact = (rstd, weight) if need_x else (None, None)
        (packed,) = keep(ctx, (x_hat, format), exact=exact)
        offer_affine(y, packed, weight, bias, format, Affine())

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _mean, _rstd):
        (x_hat,), (rstd, weight) = kept(ctx)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if (grads := _fused_grads(ctx, grad_out, x_hat, rstd, weight, len(ctx.shape))) is not None:
            return *grads, *(None,) * 5
        wide = torch.promote_types(grad_out.dtype, torch.float32)
        grad_out = grad_out.to(wide)
        grad_x = grad_weight = grad_bias = None
        rows = grad_out.dim() - len(ctx.shape)
        if need_bias:
            grad_bias = _sum_rows(grad_out, rows)
        if need_x or need_weight:
            x_hat = x_hat.unpack(wide)
            # x-hat is its own normalised form: mean 0, rstd 1; the true rstd multiplies at the end.
            unit = torch.ones((*grad_out.shape[:rows], *(1,) * len(ctx.shape)), device=x_hat.device)
            unit = unit.to(wide)
            # Its weight gradient would need the weight in hand; here that is one product.
            grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad_out.contiguous(),
                x_hat.contiguous(),
                ctx.shape,
                torch.zeros_like(unit),
                unit,
                None if weight is None else weight.to(wide),
                None,
                [need_x, False, False],
            )
            grad_x = grad_x.mul_(rstd).to(ctx.dtypes[0]) if need_x else None
            if need_weight:
                grad_weight = _sum_rows(grad_out * x_hat, rows)
        return (
            grad_x,
            None if grad_weight is None else grad_weight.to(ctx.dtypes[1]),
            None if grad_bias is None else grad_bias.to(ctx.dtypes[2]),
            *(None,) * 5,
        )


def _fused_grads(ctx, grad_out, x_hat, rstd, weight, dims, centered=True):
    """The gradients of x, weight and bias in one pass; None where x-hat is not in groups with their
    own scale, or the gradient of x is not asked for, or not in float32 or less."""
    x_hat, shape = grouped(x_hat), grad_out.shape[grad_out.dim() - dims :]
    features = math.prod(shape)
    if x_hat is None or rstd is None or features == 0 or not ctx.needs_input_grad[0]:
        return None
    if grad_out.dtype != ctx.dtypes[0] or grad_out.dtype == torch.float64:
        return None
    grad_x, *sums = torch.ops.memtl.quant_norm_grad(
        grad_out, *x_hat, rstd, weight, features, centered
    )
    given = zip(sums, ctx.dtypes[1:], ctx.needs_input_grad[1:], strict=False)
    return grad_x, *(s.view(shape).to(d) if need and d else None for s, d, need in given)


def _sum_rows(x, rows):
    """x summed over its first ``rows`` dimensions; those that are normalised remain."""
    return x.flatten(0, rows - 1).sum(0) if rows else x


def llama_rms_norm(x, weight, eps):
    """The forward that transformers' language models share, operation by operation."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gemma_rms_norm(x, weight, eps):
    """The forward of transformers' Gemma models, operation by operation: the weight is 1 + w."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return in_dtype(wide * (1.0 + weight.float()), x.dtype)


RMS_NORMS = {
    "torch": lambda x, weight, shape, eps: F.rms_norm(x, shape, weight, eps),
    "llama": lambda x, weight, shape, eps: llama_rms_norm(x, weight, eps),
    "gemma": lambda x, weight, shape, eps: gemma_rms_norm(x, weight, eps),
}
"""Who rounds where: forward(x, weight, shape, eps)."""


@dataclasses.dataclass(frozen=True)
class RMSNormed:
    """The forward again."""

    style: str
    shape: tuple[int, ...]
    eps: float | None

    def __call__(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return RMS_NORMS[self.style](x, weight, self.shape, self.eps)


class RMSNormFunction(Function):
    """y = x-hat * w, x-hat = x / sqrt(mean(x^2) + eps) over the last dimensions; w + 1 for "gemma".

    Memory: as :class:`LayerNormFunction`. ``style``: whose forward, see :data:`RMS_NORMS`.
    """

    @staticmethod
    def forward(x, weight, shape, eps, format, style, need_x, need_weight):
        return RMS_NORMS[style](x, weight, shape, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, shape, eps, format, ctx.style, need_x, need_weight = inputs
        ctx.rows = x.dim() - len(shape)
        ctx.dims = tuple(range(ctx.rows, x.dim()))
        ctx.dtypes = (x.dtype, None if weight is None else weight.dtype)
        x_hat = rstd = None
        if need_x or need_weight:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            eps = torch.finfo(wide.dtype).eps if eps is None else eps
            rstd = torch.rsqrt(wide.pow(2).mean(ctx.dims, keepdim=True) + eps)
        ctx.exact = format.exact
        if ctx.exact:  # x itself, by reference
            exact = (rstd, weight if need_x else None)
            (packed,) = keep(ctx, (None if rstd is None else x, format), exact=exact)
            if format.rebuild and packed is not None:
                again = RMSNormed(ctx.style, tuple(shape), eps)
                offer(output, rebuilt(again, packed, weight, shape=x.shape, dtype=output.dtype))
            return
        if rstd is not None:
            x_hat = pack_normalized(x, torch.zeros_like(rstd), rstd, math.prod(shape), format)
            if x_hat is None:
                x_hat = (wide * rstd).contiguous()
        (packed,) = keep(ctx, (x_hat, format), exact=(rstd, weight) if need_x else (None, None))
        recipe = Affine(one_more=ctx.style == "gemma")
        offer_affine(output, packed, weight, None, format, recipe)

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (x_hat,), (rstd, weight) = kept(ctx)
        factor = weight.float() + 1 if ctx.style == "gemma" and weight is not None else weight
        grads = _fused_grads(ctx, grad_out, x_hat, rstd, factor, len(ctx.dims), False)
        if grads is not None:
            return *grads, *(None,) * 6
        wide = torch.promote_types(grad_out.dtype, torch.float32)
        if ctx.exact:
            return *_rms_norm_grads(ctx, grad_out, x_hat.unpack(), rstd, weight), *(None,) * 6
        grad_out = grad_out.to(wide)
        x_hat = x_hat.unpack(wide)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            scaled = grad_out
            if weight is not None:
                scaled = grad_out * (weight.to(wide) + (ctx.style == "gemma"))
            projection = (scaled * x_hat).mean(ctx.dims, keepdim=True)
            grad_x = ((scaled - x_hat * projection) * rstd).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_rows(grad_out * x_hat, ctx.rows).to(ctx.dtypes[1])
        return grad_x, grad_weight, *(None,) * 6


def _rms_norm_grads(ctx, grad_out, x, rstd, weight):
    """The gradients of x and the weight from x: autograd's of :data:`RMS_NORMS`, operation by
    operation, with its roundings."""
    narrow, early, x = x.dtype, ctx.style == "llama", x.to(rstd.dtype)  # early: x-hat is rounded
    grad_out = grad_out if early else grad_out.to(x.dtype)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[1]:
        x_hat = (x * rstd).to(narrow) if early else x * rstd
        grad_weight = _sum_rows(grad_out * x_hat, ctx.rows).to(ctx.dtypes[1])
    if ctx.needs_input_grad[0]:
        if weight is not None:
            grad_out = grad_out * (1.0 + weight.float() if ctx.style == "gemma" else weight)
        grad_out = (grad_out.to(narrow) if early else grad_out).to(x.dtype)
        along = -0.5 * (grad_out * x).sum(ctx.dims, keepdim=True) * rstd.pow(3)
        elements = math.prod(x.shape[ctx.rows :])
        grad_x = (grad_out * rstd + along / elements * (2.0 * x)).to(narrow)
    return grad_x, grad_weight


class NormalizeFunction(Function):
    """y = x / max(|x|, eps) along ``dim``, in the Euclidean norm.

    Memory: ``format.nbytes(x)`` for y, and the norms, one number a row. Returns y and the norms.
    """

    @staticmethod
    def forward(x, dim, eps, format):
        norm = x.norm(2, dim, keepdim=True)  # torch's F.normalize, operation by operation
        return x / norm.clamp_min(eps).expand_as(x), norm

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.dim, ctx.eps, format = inputs
        y, norm = output
        constant(ctx, norm)
        ctx.exact = format.exact
        keep(ctx, (x if ctx.exact else y, format), exact=(norm,))

    @staticmethod
    @first_order
    def backward(ctx, grad_out, _norm):
        (y,), (norm,) = kept(ctx)
        y = y.unpack()
        if ctx.exact:  # torch's backward, operation by operation
            x, wide = y, norm.clamp_min(ctx.eps).expand_as(y)
            grad_wide = -grad_out * ((x / wide) / wide)
            grad_norm = grad_wide.sum(ctx.dim, keepdim=True)
            grad_norm = torch.where(norm >= ctx.eps, grad_norm, 0)
            grad_x = grad_out / wide + grad_norm * (x / norm).masked_fill_(norm == 0, 0)
            return grad_x, None, None, None
        along = y * (grad_out * y).sum(ctx.dim, keepdim=True)
        along = torch.where(norm < ctx.eps, 0, along)  # there the divisor is a constant
        grad_x = (grad_out - along) / norm.clamp_min(ctx.eps)
        return grad_x.to(y.dtype), None, None, None


class VectorNormFunction(Function):
    """y = |x|, the Euclidean norm over ``dim``. Memory: ``format.nbytes(x)``, and y exactly."""

    @staticmethod
    def forward(x, dim, keepdim, format):
        return torch.linalg.vector_norm(x, 2, dim, keepdim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.dim, ctx.keepdim, format = inputs
        keep(ctx, (x, format), exact=(output,))

    @staticmethod
    @first_order
    def backward(ctx, grad_out):
        (x,), (norm,) = kept(ctx)
        if not ctx.keepdim:
            dims = ctx.dim if isinstance(ctx.dim, (tuple, list)) else (ctx.dim,)
            for dim in sorted(d % len(x.shape) for d in dims):
                grad_out, norm = grad_out.unsqueeze(dim), norm.unsqueeze(dim)
        if x.format.exact:
            along = (x.unpack() / norm).masked_fill_(norm == 0, 0)
            return grad_out * along, None, None, None
        scale = torch.where(norm == 0, 0, grad_out / norm)  # torch's subgradient at 0
        return x.unpack() * scale, None, None, None
