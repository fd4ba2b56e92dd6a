"""A few bits an element in groups of 64, in Triton.

``quant_pack``             codes, and a scale and an offset for each group.
``quant_pack_normalized``  the same of (x - mean[c]) * rstd[c], which is never written.
``quant_pack_range``       codes on even levels of a fixed range.
``quant_unpack``, ``quant_unpack_range``  the numbers that codes stand for.

All are bound by memory: itemsize bytes an element on one side, bits / 8 and for scale and offset
1 / 16 on the other, each moved once. A program works on a tile of whole groups, see
quant_groups.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_devices, check_floating
from .quant_channels import by_channel, channel_options, channel_table, first_run
from .quant_checks import (
    as_pairs,
    check_bits,
    check_channels,
    check_result,
    checked_codes,
    checked_params,
    checked_range,
    folded,
    new_codes,
    new_params,
)
from .quant_groups import (
    decode_halves,
    dither,
    load_codes,
    load_halves,
    one_nan,
    options,
    pack_groups,
    program_groups,
    range_code,
    range_value,
    store_codes,
    store_halves,
    tiles,
)


@triton.jit(do_not_specialize=("seed",))
def _quant_pack_kernel(
    x_ptr, codes_ptr, params_ptr, numel, seed, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    group = program_groups(GROUPS)
    last = tl.load(x_ptr + (numel - 1))
    low, high = load_halves(x_ptr, group, numel, last)
    pack_groups(low, high, group, numel, seed, codes_ptr, params_ptr, BITS)


@triton.jit(do_not_specialize=("seed",))
def _quant_pack_normalized_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    codes_ptr,
    params_ptr,
    numel,
    channels,
    inner,
    seed,
    NARROW: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = program_groups(GROUPS)
    low, high = load_halves(x_ptr, group, numel, 0.0)
    channel, place = first_run(group, channels, inner, INDEX)
    low_mean, high_mean = by_channel(mean_ptr, channel, place, channels, inner, NARROW)
    low_rstd, high_rstd = by_channel(rstd_ptr, channel, place, channels, inner, NARROW)
    # The last group is padded with its own last element, which is of the last channel.
    last = tl.load(x_ptr + (numel - 1)).to(tl.float32)
    last -= tl.load(mean_ptr + (channels - 1)).to(tl.float32)
    last *= tl.load(rstd_ptr + (channels - 1)).to(tl.float32)
    element = group[:, None] * 64 + tl.arange(0, 32)[None, :]
    low = tl.where(element < numel, (low - low_mean) * low_rstd, last)
    high = tl.where(element + 32 < numel, (high - high_mean) * high_rstd, last)
    pack_groups(low, high, group, numel, seed, codes_ptr, params_ptr, BITS)


@triton.jit
def _quant_unpack_kernel(
    codes_ptr, params_ptr, x_ptr, numel, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    group = program_groups(GROUPS)
    low, high = decode_halves(codes_ptr, params_ptr, group, numel, BITS)
    store_halves(x_ptr, group, numel, low, high)


@triton.jit(do_not_specialize=("seed",))
def _quant_pack_range_kernel(
    x_ptr, codes_ptr, numel, lo, hi, step, seed, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    group = program_groups(GROUPS)
    last = tl.load(x_ptr + (numel - 1))
    low, high = load_halves(x_ptr, group, numel, last)
    low_dither, high_dither = dither(one_nan(low), one_nan(high), group, seed)
    low = range_code(low, lo, hi, step, low_dither, BITS)
    high = range_code(high, lo, hi, step, high_dither, BITS)
    store_codes(codes_ptr, group, numel, low, high, BITS)


@triton.jit
def _quant_unpack_range_kernel(
    codes_ptr, x_ptr, numel, lo, step, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    group = program_groups(GROUPS)
    low, high = load_codes(codes_ptr, group, numel, BITS)
    low, high = range_value(low, lo, step, BITS), range_value(high, lo, step, BITS)
    store_halves(x_ptr, group, numel, low, high)


def quant_pack(x: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """x, any shape -> codes uint8 [groups, 8 * bits], params bfloat16 [groups, 2]."""
    check_floating("quant_pack", x=x)
    check_bits("quant_pack", bits)
    x, codes = x.contiguous(), new_codes(x, bits)
    params, numel = new_params(codes), x.numel()
    if numel:
        with torch.cuda.device_of(x):
            arguments = (x, codes, as_pairs(params), numel, folded(seed))
            _quant_pack_kernel[tiles(x)](*arguments, BITS=bits, **options(x))
    return codes, params


def quant_pack_normalized(
    x: Tensor, mean: Tensor, rstd: Tensor, bits: int, inner: int, seed: int
) -> tuple[Tensor, Tensor]:
    """quant_pack of (x - mean[c]) * rstd[c]; flat element i is of channel c = (i // inner) % C."""
    name = "quant_pack_normalized"
    check_floating(name, x=x, mean=mean, rstd=rstd)
    check_devices(name, x=x, mean=mean, rstd=rstd)
    check_bits(name, bits)
    torch._check_value(inner > 0, lambda: f"{name}: expected inner > 0, got {inner}")
    x, codes = x.contiguous(), new_codes(x, bits)
    params, numel = new_params(codes), x.numel()
    if not numel:
        return codes, params
    torch._check(
        mean.numel() == rstd.numel(),
        lambda: (
            f"{name}: expected mean and rstd of one size, got {list(mean.shape)} and "
            f"{list(rstd.shape)}"
        ),
    )
    check_channels(name, mean.numel(), inner, numel)
    mean, rstd = channel_table(mean, inner), channel_table(rstd, inner)
    with torch.cuda.device_of(x):
        arguments = (x, mean, rstd, codes, as_pairs(params), numel, len(mean), inner, folded(seed))
        constants = channel_options(numel, inner) | options(x)
        _quant_pack_normalized_kernel[tiles(x)](*arguments, BITS=bits, **constants)
    return codes, params


def quant_unpack(
    codes: Tensor, params: Tensor, bits: int, size: list[int], dtype: torch.dtype
) -> Tensor:
    """The tensor of shape ``size``: offset + code * scale."""
    name = "quant_unpack"
    check_bits(name, bits)
    check_result(name, dtype)
    check_devices(name, codes=codes, params=params)
    x = codes.new_empty(size, dtype=dtype)
    codes = checked_codes(name, codes, bits, x.numel())
    pairs = checked_params(name, params, codes)
    if x.numel():
        with torch.cuda.device_of(x):
            _quant_unpack_kernel[tiles(x)](codes, pairs, x, x.numel(), BITS=bits, **options(x))
    return x


def quant_pack_range(x: Tensor, bits: int, lo: float, hi: float, seed: int) -> Tensor:
    """x, clamped to [lo, hi] -> codes uint8 [groups, 8 * bits]; the last code stands for NaN."""
    name = "quant_pack_range"
    check_floating(name, x=x)
    check_bits(name, bits)
    levels = checked_range(name, bits, lo, hi)
    x, codes = x.contiguous(), new_codes(x, bits)
    if x.numel():
        with torch.cuda.device_of(x):
            arguments = (x, codes, x.numel(), *levels, folded(seed))
            _quant_pack_range_kernel[tiles(x)](*arguments, BITS=bits, **options(x))
    return codes


def quant_unpack_range(
    codes: Tensor, bits: int, lo: float, hi: float, size: list[int], dtype: torch.dtype
) -> Tensor:
    """The tensor of shape ``size``: lo + code * step, NaN for the last code."""
    name = "quant_unpack_range"
    check_bits(name, bits)
    check_result(name, dtype)
    levels = checked_range(name, bits, lo, hi)
    x = codes.new_empty(size, dtype=dtype)
    codes = checked_codes(name, codes, bits, x.numel())
    if x.numel():
        with torch.cuda.device_of(x):
            arguments = (codes, x, x.numel(), levels.lo, levels.step)
            _quant_unpack_range_kernel[tiles(x)](*arguments, BITS=bits, **options(x))
    return x
