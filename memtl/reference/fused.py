"""Group-wise low-bit storage decoded and used at once: the definitions in plain PyTorch.

All arithmetic is in float32. An activation and its derivative are torch's own here; a kernel's may
be off by 5e-7 * max(1, |x|) and by 5e-7, and has the limits at the infinities, where torch has NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import bits_unpack
from .quant import dither, in_groups, quant_unpack, quant_unpack_range, range_codes

aten = torch.ops.aten


def quant_unpack_affine(
    codes: Tensor,
    params: Tensor,
    bits: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    inner: int,
    size: list[int],
    dtype: torch.dtype,
    lo: float = 0.0,
    hi: float | None = None,
) -> Tensor:
    """decoded * weight + bias; where a bit of the mask is clear, lo or the nearer hi. Flat element
    i is of channel (i // inner) % C, and there is a whole number of C * inner."""
    numel = math.prod(size)
    x = quant_unpack(codes, params, bits, [numel], torch.float32)
    if weight is not None and numel:
        x = (x.view(-1, weight.numel(), inner) * weight.float().reshape(-1, 1)).flatten()
    if bias is not None and numel:
        x = (x.view(-1, bias.numel(), inner) + bias.float().reshape(-1, 1)).flatten()
    if mask is not None:
        end = torch.full_like(x, lo) if hi is None else torch.where(x < (lo + hi) / 2, lo, hi)
        x = torch.where(bits_unpack(mask, numel), x, end)
    return x.view(size).to(dtype)


def _hardswish_derivative(x: Tensor) -> Tensor:  # torch's is 1 at NaN
    return aten.hardswish_backward(torch.ones_like(x), x).masked_fill(x.isnan(), math.nan)


def _quick_gelu_derivative(x: Tensor) -> Tensor:
    return aten.silu_backward(torch.ones_like(x), 1.702 * x)


def _gelu_derivative(approximate: str):
    return lambda x: aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)


ACTIVATIONS = {
    "gelu": (F.gelu, _gelu_derivative("none")),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_derivative("tanh")),
    "silu": (F.silu, lambda x: aten.silu_backward(torch.ones_like(x), x)),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), _quick_gelu_derivative),
    "hardswish": (F.hardswish, _hardswish_derivative),
    "mish": (F.mish, lambda x: aten.mish_backward(torch.ones_like(x), x)),
}
"""f and its derivative."""


def quant_unpack_activation(
    codes: Tensor, params: Tensor, bits: int, activation: str, size: list[int], dtype: torch.dtype
) -> Tensor:
    """f(decoded)."""
    f, _ = ACTIVATIONS[activation]
    return f(quant_unpack(codes, params, bits, size, torch.float32)).to(dtype)


def quant_activation_grad(
    grad_out: Tensor, codes: Tensor, params: Tensor, bits: int, activation: str
) -> Tensor:
    """grad_out * f'(decoded)."""
    _, derivative = ACTIVATIONS[activation]
    x = quant_unpack(codes, params, bits, list(grad_out.shape), torch.float32)
    return derivative(x).mul_(grad_out.float()).to(grad_out.dtype)


def quant_pack_derivative(
    x: Tensor, bits: int, activation: str, lo: float, hi: float, seed: int
) -> Tensor:
    """f'(x) on a fixed range; rounded by the dither of x, which is the same however exactly a
    kernel computes f'. At the infinities f' is NaN, but for hardswish's; here a kernel's is too, so
    that they stay visible."""
    _, derivative = ACTIVATIONS[activation]
    groups = in_groups(x)
    return range_codes(derivative(groups), bits, lo, hi, dither(groups, seed))


def quant_apply_range(grad_out: Tensor, codes: Tensor, bits: int, lo: float, hi: float) -> Tensor:
    """grad_out * decoded, on a fixed range."""
    x = quant_unpack_range(codes, bits, lo, hi, list(grad_out.shape), torch.float32)
    return x.mul_(grad_out.float()).to(grad_out.dtype)


def quant_norm_grad(
    grad_out: Tensor,
    codes: Tensor,
    params: Tensor,
    bits: int,
    rstd: Tensor,
    weight: Tensor | None,
    features: int,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of layer norm or, not ``centered``, RMS norm from their x-hat."""
    grad = grad_out.reshape(-1, features).float()
    x_hat = quant_unpack(codes, params, bits, list(grad.shape), torch.float32)
    scaled = grad if weight is None else grad * weight.float().reshape(-1)
    own = scaled - x_hat * (scaled * x_hat).mean(1, keepdim=True)
    if centered:
        own -= scaled.mean(1, keepdim=True)
    grad_x = (own * rstd.float().reshape(-1, 1)).view(grad_out.shape)
    return grad_x.to(grad_out.dtype), (grad * x_hat).sum(0), grad.sum(0)


def quant_channel_norm_grad(
    grad_out: Tensor,
    codes: Tensor,
    params: Tensor,
    bits: int,
    rstd: Tensor,
    weight: Tensor | None,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of batch norm in training from its x-hat [B, C, inner]."""
    size = [grad_out.numel() // (rstd.numel() * inner), rstd.numel(), inner]
    grad = grad_out.reshape(size).float()
    x_hat = quant_unpack(codes, params, bits, size, torch.float32)
    slope = rstd.float().reshape(-1, 1)
    if weight is not None:
        slope = slope * weight.float().reshape(-1, 1)
    product = grad * x_hat
    mean, projection = (t.mean((0, 2)).unsqueeze(1) for t in (grad, product))
    grad_x = ((grad - mean - x_hat * projection) * slope).view(grad_out.shape)
    return grad_x.to(grad_out.dtype), product.sum((0, 2)), grad.sum((0, 2))
