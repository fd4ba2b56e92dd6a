"""Back Razor in the form of its released algorithm: the baseline of ours.

Of every activation that a linear layer, a layer norm or attention keeps, each sample has a
threshold of its own, found by ``kthvalue``; what is above stands in a bitmap and a list of values,
and backward makes a dense tensor of them again and multiplies that. GELU keeps its input whole, in
half precision. Attention is spelled out, so its map is kept too, pruned like the rest.

Written from the paper (Jiang et al., NeurIPS 2022); for transformers, which that is about.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


def apply_released_back_razor(model: Any, keep: float = 0.1) -> None:
    """In place; the forward pass still gives what it gave."""
    model.forward = _Forward(model.forward, keep)


class _Forward:
    def __init__(self, forward: Callable[..., Any], keep: float) -> None:
        self.forward = forward
        self.keep = keep

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Pruned(self.keep):
            return self.forward(*args, **kwargs)


class _Pruned(TorchFunctionMode):
    """Calls of four functions go to those below."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _INSTEAD.get(func)
        return own(self.keep, *args, **kwargs or {}) if own else func(*args, **kwargs or {})


def prune(x: Tensor, keep: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values kept, and a bit an element that says which these are, eight to a byte.

    Of n elements of a sample those are kept whose magnitude is at least the
    ``int(n (1 - keep))``-th smallest.
    """
    samples = x.reshape(len(x), -1)
    magnitudes = samples.abs()
    n = samples.shape[1]
    threshold = magnitudes.kthvalue(min(max(int(n * (1 - keep)), 1), n), dim=1, keepdim=True).values
    mask = magnitudes >= threshold
    bits = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    return samples[mask].to(dtype), (bits << torch.arange(8, dtype=torch.uint8)).sum(
        1, dtype=torch.uint8
    )


def rebuild(values: Tensor, bitmap: Tensor, shape: torch.Size) -> Tensor:
    """A dense tensor of that shape, in float32."""
    bits = bitmap[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    mask = bits.flatten()[: shape.numel()].bool()
    return torch.zeros(shape.numel()).masked_scatter_(mask, values.float()).view(shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: float) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(weight, *prune(x, keep, torch.float16))
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, *kept = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        x = rebuild(*kept, ctx.shape).flatten(0, -2)
        return grad @ weight, rows.t() @ x, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float, keep: float
    ) -> Tensor:
        y, mean, deviation = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.normalised = x.shape, shape
        ctx.save_for_backward(weight, bias, mean, deviation, *prune(x, keep, torch.float32))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, bias, mean, deviation, *kept = ctx.saved_tensors
        grads = torch.ops.aten.native_layer_norm_backward(
            grad, rebuild(*kept, ctx.shape), ctx.normalised, mean, deviation, weight, bias,
            [True, True, True],
        )  # fmt: skip
        return grads[0], None, grads[1], grads[2], None, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(x.half())
        return F.gelu(x, approximate=approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.to(grad.dtype)
        return torch.ops.aten.gelu_backward(grad, x, approximate=ctx.approximate), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop: float, scale: float,
        keep: float,
    ) -> Tensor:  # fmt: skip
        scores = q @ k.mT * scale
        if mask is not None:
            no = -math.inf
            scores = scores.masked_fill(~mask, no) if mask.dtype == torch.bool else scores + mask
        p = scores.softmax(-1)
        left = torch.rand_like(p) >= drop if drop else None
        kept = [t for x in (q, k, v, p) for t in prune(x, keep, torch.float16)]
        ctx.shapes = [x.shape for x in (q, k, v, p)]
        ctx.drop, ctx.scale = drop, scale
        ctx.save_for_backward(left, *kept)
        return (p if left is None else p * left / (1 - drop)) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        left, *kept = ctx.saved_tensors
        q, k, v, p = (
            rebuild(kept[2 * i], kept[2 * i + 1], shape) for i, shape in enumerate(ctx.shapes)
        )
        factor = 1.0 if left is None else left / (1 - ctx.drop)
        grad_p = grad @ v.mT * factor
        grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype) * ctx.scale
        return grad_scores @ k, grad_scores.mT @ q, (p * factor).mT @ grad, None, None, None, None


def _linear(keep: float, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(x, weight, bias, keep)


def _layer_norm(
    keep: float, x: Tensor, normalized_shape: Any, weight: Any, bias: Any, eps: float = 1e-5
) -> Tensor:
    return _LayerNorm.apply(x, normalized_shape, weight, bias, eps, keep)


def _gelu(keep: float, x: Tensor, *, approximate: str = "none") -> Tensor:
    return _Gelu.apply(x, approximate)


def _attention(
    keep: float, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    if is_causal:
        raise ValueError("is_causal must be False: the baseline is for encoders")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Attention.apply(query, key, value, attn_mask, dropout_p, scale, keep)


_INSTEAD: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.gelu: _gelu,
    F.scaled_dot_product_attention: _attention,
}
