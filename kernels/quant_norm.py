"""The gradients of normalisations from x-hat in groups of 64, in Triton.

``quant_norm_grad``          of layer norm and RMS norm: rows of features.
``quant_channel_norm_grad``  of batch norm in training: [B, C, inner] by channel.

Both are bound by memory: grad_out and codes are read, grad_x is written. A row of layer norm stays
where it was read while its sums are taken; a channel's sums need all of it, so that grad_out and
codes are read twice there, as are those of rows of more than WIDEST features.

Sums over rows, for weight and bias, and over a channel are taken in two stages: a program adds up
what it reads in its own registers and writes that once; what programs wrote is added up by torch.
No addition is atomic, so the same input gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtl._ops import GROUP

from .common import check_devices, check_floating
from .quant_channels import by_channel, channel_options, channel_table, first_run
from .quant_checks import (
    check_bits,
    check_channels,
    check_numel,
    checked_codes,
    checked_params,
)
from .quant_groups import (
    decode_halves,
    decode_places,
    load_halves,
    options,
    program_groups,
    store_halves,
    tiles,
)

TILE, CHANNEL_TILE = 2048, 1024
"""Elements that a program of four warps reads at once, of rows and of channels."""
WIDEST = 4096
"""Features of a row that is read once."""
PROGRAMS, LEAST = 512, 4
"""That share the rows, and how many tiles one takes at least: it writes two sums a column."""
CHANNEL_PROGRAMS = 1024
"""That share the channels: one writes two sums a channel."""


@triton.jit
def _row_sums_kernel(
    grad_out_ptr,
    codes_ptr,
    params_ptr,
    weight_ptr,
    sums_ptr,
    features,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[row] = of scaled * x-hat, and of scaled, a row that is read block by block."""
    row = tl.program_id(0).to(tl.int64)
    products, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.cdiv(features, BLOCK)):
        first = tl.cast(block, tl.int64) * BLOCK
        place = tl.arange(0, BLOCK)
        inside = first + place < features
        start = row * features + first
        scaled = tl.load(grad_out_ptr + start + place, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + first + place, mask=inside, other=0.0)
            scaled *= weight.to(tl.float32)
        x_hat = decode_places(codes_ptr, params_ptr, start, place, inside, ALIGNED, BITS)
        products += scaled * x_hat
        total += scaled
    tl.store(sums_ptr + 2 * row, tl.sum(products, axis=0))
    tl.store(sums_ptr + 2 * row + 1, tl.sum(total, axis=0))


@triton.jit
def _norm_grad_kernel(
    grad_out_ptr,
    codes_ptr,
    params_ptr,
    rstd_ptr,
    weight_ptr,
    sums_ptr,
    grad_ptr,
    partial_ptr,
    rows,
    features,
    CENTERED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_x of tiles of ROWS rows and BLOCK columns, and their sums over rows:
    partial[0, program] = of grad_out * x-hat, partial[1, program] = of grad_out."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = tl.program_id(1).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)[None, :]
    column = first + place
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < features, other=0.0).to(tl.float32)
    products, total = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < features)
        start = row * features + first
        grad = tl.load(grad_out_ptr + start + place, mask=inside, other=0.0).to(tl.float32)
        x_hat = decode_places(codes_ptr, params_ptr, start, place, inside, ALIGNED, BITS)
        scaled = grad
        if weight_ptr is not None:
            scaled = grad * weight
        if sums_ptr is None:  # the whole row is here
            projection = tl.sum(scaled * x_hat, axis=1, keep_dims=True)
            mean = tl.sum(scaled, axis=1, keep_dims=True)
        else:
            projection = tl.load(sums_ptr + 2 * row, mask=row < rows, other=0.0)
            mean = tl.load(sums_ptr + 2 * row + 1, mask=row < rows, other=0.0)
        own = scaled - x_hat * (projection / features)
        if CENTERED:
            own -= mean / features
        own *= tl.load(rstd_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(grad_ptr + start + place, own.to(grad_ptr.dtype.element_ty), mask=inside)
        products += grad * x_hat
        total += grad
    partial = partial_ptr + program.to(tl.int64) * features + first + tl.arange(0, BLOCK)
    inside = first + tl.arange(0, BLOCK) < features
    tl.store(partial, tl.sum(products, axis=0), mask=inside)
    partial += programs.to(tl.int64) * features
    tl.store(partial, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _channel_sums_kernel(
    grad_out_ptr,
    codes_ptr,
    params_ptr,
    partial_ptr,
    batch,
    channels,
    inner,
    parts,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Sums of a tile [CHANNELS, INNER] of every sample of a part, of which there are ``parts``:
    partial[0, block * parts + part, channel] = of grad_out * x-hat, partial[1, ...] = of grad_out.
    """
    blocks = tl.cdiv(inner, INNER)
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts % blocks
    channel = tl.program_id(0).to(tl.int64) // parts // blocks * CHANNELS
    first = channel * inner + block.to(tl.int64) * INNER
    place = tl.arange(0, CHANNELS)[:, None] * inner + tl.arange(0, INNER)[None, :]
    channel += tl.arange(0, CHANNELS)
    inside = (channel < channels)[:, None]
    inside &= (block * INNER + tl.arange(0, INNER) < inner)[None, :]
    products = tl.zeros((CHANNELS, INNER), tl.float32)
    total = tl.zeros((CHANNELS, INNER), tl.float32)
    for sample in range(part, batch, parts):
        start = tl.cast(sample, tl.int64) * channels * inner + first
        grad = tl.load(grad_out_ptr + start + place, mask=inside, other=0.0).to(tl.float32)
        x_hat = decode_places(codes_ptr, params_ptr, start, place, inside, ALIGNED, BITS)
        products += grad * x_hat
        total += grad
    row = block.to(tl.int64) * parts + part
    partial = partial_ptr + row * channels + channel
    tl.store(partial, tl.sum(products, axis=1), mask=channel < channels)
    partial += tl.cast(blocks, tl.int64) * parts * channels
    tl.store(partial, tl.sum(total, axis=1), mask=channel < channels)


@triton.jit
def _channel_grad_kernel(
    grad_out_ptr,
    codes_ptr,
    params_ptr,
    products_ptr,
    sums_ptr,
    rstd_ptr,
    weight_ptr,
    grad_ptr,
    scale,
    numel,
    channels,
    inner,
    NARROW: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """grad_x = (grad_out - mean - x-hat * projection) * rstd * weight, ``scale`` times the sums by
    channel being mean and projection."""
    group = program_groups(GROUPS)
    low_grad, high_grad = load_halves(grad_out_ptr, group, numel, 0.0)
    low, high = decode_halves(codes_ptr, params_ptr, group, numel, BITS)
    channel, place = first_run(group, channels, inner, INDEX)
    low_sum, high_sum = by_channel(products_ptr, channel, place, channels, inner, NARROW)
    low, high = low_grad - low * (low_sum * scale), high_grad - high * (high_sum * scale)
    low_sum, high_sum = by_channel(sums_ptr, channel, place, channels, inner, NARROW)
    low, high = low - low_sum * scale, high - high_sum * scale
    low_slope, high_slope = by_channel(rstd_ptr, channel, place, channels, inner, NARROW)
    if weight_ptr is not None:
        low_weight, high_weight = by_channel(weight_ptr, channel, place, channels, inner, NARROW)
        low_slope, high_slope = low_slope * low_weight, high_slope * high_weight
    store_halves(grad_ptr, group, numel, low * low_slope, high * high_slope)


def _norm_options(features: int) -> dict[str, Any]:
    """What _norm_grad_kernel is compiled with."""
    block = min(max(triton.next_power_of_2(features), 64), WIDEST)
    return {
        "ALIGNED": features % GROUP == 0,
        "ROWS": max(TILE // block, 1),
        "BLOCK": block,
        "num_warps": max(4 * block // TILE, 4),
    }


def _row_options(features: int) -> dict[str, Any]:
    """What _row_sums_kernel is compiled with."""
    return {"ALIGNED": features % GROUP == 0, "BLOCK": TILE, "num_warps": 4}


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
    """The gradients of x, contiguous, and of weight and bias [features] in float32."""
    name = "quant_norm_grad"
    check_floating(name, grad_out=grad_out, rstd=rstd, weight=weight)
    check_bits(name, bits)
    check_devices(name, grad_out=grad_out, codes=codes, params=params, rstd=rstd, weight=weight)
    torch._check(
        features > 0 and grad_out.numel() % features == 0,
        lambda: f"{name}: grad_out {list(grad_out.shape)} is no rows of {features}",
    )
    grad_out = grad_out.contiguous()
    grad, rows = torch.empty_like(grad_out), grad_out.numel() // features
    codes = checked_codes(name, codes, bits, grad.numel())
    read = (grad_out, codes, checked_params(name, params, codes))
    check_numel(name, rows, rstd=rstd)
    check_numel(name, features, weight=weight)
    rstd, weight = rstd.contiguous(), None if weight is None else weight.contiguous()
    constants = _norm_options(features)
    blocks = triton.cdiv(features, constants["BLOCK"])
    programs = min(triton.cdiv(rows, constants["ROWS"] * LEAST), triton.cdiv(PROGRAMS, blocks))
    partial = grad.new_empty((2, programs, features), dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(grad):
            sums = None
            if blocks > 1:
                sums, alone = partial.new_empty((rows, 2)), _row_options(features)
                _row_sums_kernel[(rows,)](*read, weight, sums, features, BITS=bits, **alone)
            arguments = (*read, rstd, weight, sums, grad, partial, rows, features)
            constants |= {"CENTERED": centered, "BITS": bits}
            _norm_grad_kernel[(programs, blocks)](*arguments, **constants)
    return grad, partial[0].sum(0), partial[1].sum(0)


def _sums_options(channels: int, inner: int) -> dict[str, Any]:
    """What _channel_sums_kernel is compiled with: a tile of one channel or, where they are short,
    of several."""
    wide = min(triton.next_power_of_2(inner), CHANNEL_TILE)
    tall = CHANNEL_TILE // wide
    aligned = channels * inner % GROUP == 0 and tall * inner % GROUP == 0
    return {"ALIGNED": aligned, "CHANNELS": tall, "INNER": wide, "num_warps": 4}


def quant_channel_norm_grad(
    grad_out: Tensor,
    codes: Tensor,
    params: Tensor,
    bits: int,
    rstd: Tensor,
    weight: Tensor | None,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, contiguous, and of weight and bias [C] in float32."""
    name = "quant_channel_norm_grad"
    check_floating(name, grad_out=grad_out, rstd=rstd, weight=weight)
    check_bits(name, bits)
    check_devices(name, grad_out=grad_out, codes=codes, params=params, rstd=rstd, weight=weight)
    channels, numel = rstd.numel(), grad_out.numel()
    check_channels(name, channels, inner, numel)
    check_numel(name, channels, weight=weight)
    grad_out = grad_out.contiguous()
    grad, codes = torch.empty_like(grad_out), checked_codes(name, codes, bits, numel)
    read = (grad_out, codes, checked_params(name, params, codes))
    with torch.cuda.device_of(grad):
        products, sums = _channel_sums(*read, bits, channels, inner)
        if numel:
            tables = [channel_table(t, inner) for t in (products, sums, rstd)]
            factors = None if weight is None else channel_table(weight, inner)
            sizes = (channels / numel, numel, len(tables[0]), inner)
            constants = channel_options(numel, inner) | options(grad)
            _channel_grad_kernel[tiles(grad)](
                *read, *tables, factors, grad, *sizes, BITS=bits, **constants
            )
    return grad, products, sums


def _channel_sums(
    grad_out: Tensor, codes: Tensor, pairs: Tensor, bits: int, channels: int, inner: int
) -> tuple[Tensor, Tensor]:
    """Of grad_out * x-hat and of grad_out, [C]."""
    batch, constants = grad_out.numel() // (channels * inner), _sums_options(channels, inner)
    blocks = triton.cdiv(inner, constants["INNER"])
    programs = triton.cdiv(channels, constants["CHANNELS"]) * blocks
    parts = min(batch, triton.cdiv(CHANNEL_PROGRAMS, programs))
    partial = grad_out.new_empty((2, blocks * parts, channels), dtype=torch.float32)
    if batch:
        arguments = (grad_out, codes, pairs, partial, batch, channels, inner, parts)
        _channel_sums_kernel[(programs * parts,)](*arguments, BITS=bits, **constants)
    return partial[0].sum(0), partial[1].sum(0)
