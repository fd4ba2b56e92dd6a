"""Groups that are decoded and used in one pass over memory, in Triton.

``quant_unpack_affine``      decoded * weight[c] + bias[c], an end where a bit of a mask is clear.
``quant_unpack_activation``  f(decoded).
``quant_activation_grad``    grad_out * f'(decoded).
``quant_pack_derivative``    f'(x), coded on a fixed range.
``quant_apply_range``        grad_out * decoded, on a fixed range.

All are bound by memory: what is decoded, or coded, is never written, so that an element costs its
bits and what is read and made of it: itemsize bytes each. Tiles are those of quant_groups.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_devices, check_floating
from .quant_channels import by_channel, channel_options, channel_table, first_run
from .quant_checks import (
    check_activation,
    check_bits,
    check_channels,
    check_result,
    checked_codes,
    checked_params,
    checked_range,
    folded,
    new_codes,
)
from .quant_groups import (
    decode_halves,
    dither,
    load_codes,
    load_halves,
    one_nan,
    options,
    program_groups,
    range_code,
    range_value,
    store_codes,
    store_halves,
    tiles,
)
from .quant_math import activated, derived


@triton.jit
def _quant_unpack_affine_kernel(
    codes_ptr,
    params_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    x_ptr,
    numel,
    weights,
    biases,
    inner,
    lo,
    hi,
    middle,
    NARROW: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = program_groups(GROUPS)
    low, high = decode_halves(codes_ptr, params_ptr, group, numel, BITS)
    if weight_ptr is not None:
        channel, place = first_run(group, weights, inner, INDEX)
        low_weight, high_weight = by_channel(weight_ptr, channel, place, weights, inner, NARROW)
        low, high = low * low_weight, high * high_weight
    if bias_ptr is not None:
        channel, place = first_run(group, biases, inner, INDEX)
        low_bias, high_bias = by_channel(bias_ptr, channel, place, biases, inner, NARROW)
        low, high = low + low_bias, high + high_bias
    if mask_ptr is not None:
        lane = tl.arange(0, 32)[None, :]
        byte = group[:, None] * 8 + lane // 8
        low_bits = tl.load(mask_ptr + byte, mask=byte * 8 < numel, other=0).to(tl.int32)
        high_bits = tl.load(mask_ptr + byte + 4, mask=byte * 8 + 32 < numel, other=0).to(tl.int32)
        low_end, high_end = tl.where(low < middle, lo, hi), tl.where(high < middle, lo, hi)
        low = tl.where((low_bits >> (lane % 8)) & 1 != 0, low, low_end)
        high = tl.where((high_bits >> (lane % 8)) & 1 != 0, high, high_end)
    store_halves(x_ptr, group, numel, low, high)


@triton.jit
def _quant_unpack_activation_kernel(
    codes_ptr,
    params_ptr,
    x_ptr,
    numel,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = program_groups(GROUPS)
    low, high = decode_halves(codes_ptr, params_ptr, group, numel, BITS)
    low, high = activated(low, ACTIVATION), activated(high, ACTIVATION)
    store_halves(x_ptr, group, numel, low, high)


@triton.jit
def _quant_activation_grad_kernel(
    grad_out_ptr,
    codes_ptr,
    params_ptr,
    grad_ptr,
    numel,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = program_groups(GROUPS)
    low_grad, high_grad = load_halves(grad_out_ptr, group, numel, 0.0)
    low, high = decode_halves(codes_ptr, params_ptr, group, numel, BITS)
    low, high = derived(low, ACTIVATION) * low_grad, derived(high, ACTIVATION) * high_grad
    store_halves(grad_ptr, group, numel, low, high)


@triton.jit(do_not_specialize=("seed",))
def _quant_pack_derivative_kernel(
    x_ptr,
    codes_ptr,
    numel,
    lo,
    hi,
    step,
    seed,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = program_groups(GROUPS)
    last = tl.load(x_ptr + (numel - 1))
    low, high = load_halves(x_ptr, group, numel, last)
    low_dither, high_dither = dither(one_nan(low), one_nan(high), group, seed)
    if ACTIVATION != "hardswish":  # as torch's, f' is NaN at the infinities
        low, high = low + (low - low), high + (high - high)
    low = range_code(derived(low, ACTIVATION), lo, hi, step, low_dither, BITS)
    high = range_code(derived(high, ACTIVATION), lo, hi, step, high_dither, BITS)
    store_codes(codes_ptr, group, numel, low, high, BITS)


@triton.jit
def _quant_apply_range_kernel(
    grad_out_ptr, codes_ptr, grad_ptr, numel, lo, step, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    group = program_groups(GROUPS)
    low_grad, high_grad = load_halves(grad_out_ptr, group, numel, 0.0)
    low, high = load_codes(codes_ptr, group, numel, BITS)
    low = range_value(low, lo, step, BITS) * low_grad
    high = range_value(high, lo, step, BITS) * high_grad
    store_halves(grad_ptr, group, numel, low, high)


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
    """The tensor of shape ``size``; flat element i is of channel (i // inner) % C."""
    name = "quant_unpack_affine"
    check_bits(name, bits)
    check_result(name, dtype)
    check_floating(name, weight=weight, bias=bias)
    check_devices(name, codes=codes, params=params, weight=weight, bias=bias, mask=mask)
    torch._check_value(inner > 0, lambda: f"{name}: expected inner > 0, got {inner}")
    torch._check_value(
        hi is None or lo < hi, lambda: f"{name}: expected lo < hi, got lo {lo} and hi {hi}"
    )
    ends = (lo, lo, lo) if hi is None else (lo, hi, (lo + hi) / 2)
    x = codes.new_empty(size, dtype=dtype)
    codes = checked_codes(name, codes, bits, x.numel())
    pairs = checked_params(name, params, codes)
    if mask is not None:
        mask = _checked_mask(name, mask, x.numel())
    if not x.numel():
        return x
    tables = []
    for table in (weight, bias):
        if table is not None:
            check_channels(name, table.numel(), inner, x.numel())
            table = channel_table(table, inner)
        tables.append(table)
    channels = [0 if table is None else len(table) for table in tables]
    with torch.cuda.device_of(x):
        arguments = (codes, pairs, *tables, mask, x, x.numel(), *channels, inner, *ends)
        constants = channel_options(x.numel(), inner) | options(x)
        _quant_unpack_affine_kernel[tiles(x)](*arguments, BITS=bits, **constants)
    return x


def _checked_mask(name: str, mask: Tensor, numel: int) -> Tensor:
    torch._check(
        mask.dtype == torch.uint8 and mask.numel() == triton.cdiv(numel, 8),
        lambda: (
            f"{name}: {numel} elements need {triton.cdiv(numel, 8)} uint8 of mask, "
            f"got {mask.numel()} {mask.dtype}"
        ),
    )
    return mask.contiguous()


def quant_unpack_activation(
    codes: Tensor, params: Tensor, bits: int, activation: str, size: list[int], dtype: torch.dtype
) -> Tensor:
    """The tensor of shape ``size``: f(decoded)."""
    name = "quant_unpack_activation"
    check_bits(name, bits)
    check_activation(name, activation)
    check_result(name, dtype)
    check_devices(name, codes=codes, params=params)
    x = codes.new_empty(size, dtype=dtype)
    codes = checked_codes(name, codes, bits, x.numel())
    pairs = checked_params(name, params, codes)
    if x.numel():
        with torch.cuda.device_of(x):
            constants = {"ACTIVATION": activation, "BITS": bits} | options(x)
            _quant_unpack_activation_kernel[tiles(x)](codes, pairs, x, x.numel(), **constants)
    return x


def quant_activation_grad(
    grad_out: Tensor, codes: Tensor, params: Tensor, bits: int, activation: str
) -> Tensor:
    """grad_out * f'(decoded), contiguous."""
    name = "quant_activation_grad"
    check_floating(name, grad_out=grad_out)
    check_bits(name, bits)
    check_activation(name, activation)
    check_devices(name, grad_out=grad_out, codes=codes, params=params)
    grad_out = grad_out.contiguous()
    grad, numel = torch.empty_like(grad_out), grad_out.numel()
    codes = checked_codes(name, codes, bits, numel)
    pairs = checked_params(name, params, codes)
    if numel:
        with torch.cuda.device_of(grad):
            constants = {"ACTIVATION": activation, "BITS": bits} | options(grad)
            arguments = (grad_out, codes, pairs, grad, numel)
            _quant_activation_grad_kernel[tiles(grad)](*arguments, **constants)
    return grad


def quant_pack_derivative(
    x: Tensor, bits: int, activation: str, lo: float, hi: float, seed: int
) -> Tensor:
    """x, any shape -> codes uint8 [groups, 8 * bits] of f'(x); the last code stands for NaN."""
    name = "quant_pack_derivative"
    check_floating(name, x=x)
    check_bits(name, bits)
    check_activation(name, activation)
    levels = checked_range(name, bits, lo, hi)
    x, codes = x.contiguous(), new_codes(x, bits)
    if x.numel():
        with torch.cuda.device_of(x):
            constants = {"ACTIVATION": activation, "BITS": bits} | options(x)
            arguments = (x, codes, x.numel(), *levels, folded(seed))
            _quant_pack_derivative_kernel[tiles(x)](*arguments, **constants)
    return codes


def quant_apply_range(grad_out: Tensor, codes: Tensor, bits: int, lo: float, hi: float) -> Tensor:
    """grad_out * decoded, on a fixed range; contiguous."""
    name = "quant_apply_range"
    check_floating(name, grad_out=grad_out)
    check_bits(name, bits)
    levels = checked_range(name, bits, lo, hi)
    check_devices(name, grad_out=grad_out, codes=codes)
    grad_out = grad_out.contiguous()
    grad, numel = torch.empty_like(grad_out), grad_out.numel()
    codes = checked_codes(name, codes, bits, numel)
    if numel:
        with torch.cuda.device_of(grad):
            arguments = (grad_out, codes, grad, numel, levels.lo, levels.step)
            _quant_apply_range_kernel[tiles(grad)](*arguments, BITS=bits, **options(grad))
    return grad
