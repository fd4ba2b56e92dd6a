"""Groups of 64 elements and their codes, as the kernels of ``quant`` read and write them.

A program works on a tile of groups, in halves: tensors [GROUPS, 32] of the elements 0..31 and of
the elements 32..63. One hash gives the dither of an element of either half, and where codes have 4
bits or 2, one byte holds elements of both: all that is decided of a byte is decided in one thread.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from memtl._ops import GROUP

BYTES = 8192
"""Of the tensor that a program reads or makes: four 16-byte loads for each of 128 threads."""


def options(x: Tensor) -> dict[str, Any]:
    """What a kernel is compiled with that reads or makes x: a product and a sum are rounded each
    for itself, as the definition rounds them."""
    return {"GROUPS": BYTES // (GROUP * x.itemsize), "num_warps": 4, "enable_fp_fusion": False}


def tiles(x: Tensor) -> tuple[int]:
    """The programs for x."""
    return (triton.cdiv(x.nbytes, BYTES),)


@triton.jit
def program_groups(GROUPS: tl.constexpr):
    """The groups of this program, [GROUPS]."""
    return tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)


@triton.jit
def load_halves(x_ptr, group, numel, last):
    """float32; ``last`` where there are no elements any more."""
    element = group[:, None] * 64 + tl.arange(0, 32)[None, :]
    low = tl.load(x_ptr + element, mask=element < numel, other=last)
    high = tl.load(x_ptr + element + 32, mask=element + 32 < numel, other=last)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def store_halves(x_ptr, group, numel, low, high):
    element = group[:, None] * 64 + tl.arange(0, 32)[None, :]
    dtype = x_ptr.dtype.element_ty
    tl.store(x_ptr + element, low.to(dtype), mask=element < numel)
    tl.store(x_ptr + element + 32, high.to(dtype), mask=element + 32 < numel)


# ------------------------------------------------------------------------------------------ codes


@triton.jit
def load_codes(codes_ptr, group, numel, BITS: tl.constexpr):
    """int32, of both halves; 0 where there are no groups any more."""
    lane = tl.arange(0, 32)[None, :]
    row = codes_ptr + group[:, None] * (8 * BITS)
    inside = (group * 64 < numel)[:, None]
    if BITS == 8:
        low = tl.load(row + lane, mask=inside, other=0).to(tl.int32)
        high = tl.load(row + 32 + lane, mask=inside, other=0).to(tl.int32)
    elif BITS == 4:
        byte = tl.load(row + lane, mask=inside, other=0).to(tl.int32)
        low, high = byte & 15, byte >> 4
    else:
        byte = tl.load(row + lane % 16, mask=inside, other=0).to(tl.int32) >> (lane // 16 * 2)
        low, high = byte & 3, (byte >> 4) & 3
        if BITS == 3:
            thirds = (row + 16).to(tl.pointer_type(tl.int32))
            low |= ((tl.load(thirds, mask=inside, other=0) >> lane) & 1) << 2
            high |= ((tl.load(thirds + 1, mask=inside, other=0) >> lane) & 1) << 2
    return low, high


@triton.jit
def store_codes(codes_ptr, group, numel, low, high, BITS: tl.constexpr):
    """Of int32 codes of both halves."""
    lane = tl.arange(0, 32)[None, :]
    row = codes_ptr + group[:, None] * (8 * BITS)
    inside = (group * 64 < numel)[:, None]
    if BITS == 8:
        tl.store(row + lane, low.to(tl.uint8), mask=inside)
        tl.store(row + 32 + lane, high.to(tl.uint8), mask=inside)
    elif BITS == 4:
        tl.store(row + lane, (low | high << 4).to(tl.uint8), mask=inside)
    else:
        both = tl.reshape((low & 3) | (high & 3) << 4, (group.shape[0], 2, 16))
        byte = tl.sum(both << (tl.arange(0, 2) * 2)[None, :, None], axis=1)
        tl.store(row + tl.arange(0, 16)[None, :], byte.to(tl.uint8), mask=inside)
        if BITS == 3:
            thirds = (codes_ptr + group * 24 + 16).to(tl.pointer_type(tl.uint32))
            tl.store(thirds, _bits(low >> 2), mask=group * 64 < numel)
            tl.store(thirds + 1, _bits(high >> 2), mask=group * 64 < numel)


@triton.jit
def _bits(flags):
    """Of flags [G, 32], 0 or 1, a word each."""
    return tl.sum(flags << tl.arange(0, 32)[None, :], axis=1).to(tl.uint32)


# ----------------------------------------------------------------------------- scale and offset


@triton.jit
def split_params(pair):
    """float32 scale and offset, of both as the 32 bits in which they stand beside each other."""
    scale = (pair << 16).to(tl.float32, bitcast=True)
    return scale, (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def decode_halves(codes_ptr, params_ptr, group, numel, BITS: tl.constexpr):
    """float32, what quant_unpack gives."""
    low, high = load_codes(codes_ptr, group, numel, BITS)
    pair = tl.load(params_ptr + group, mask=group * 64 < numel, other=0)
    scale, offset = split_params(pair[:, None])
    return low.to(tl.float32) * scale + offset, high.to(tl.float32) * scale + offset


@triton.jit
def decode_places(
    codes_ptr, params_ptr, start, place, inside, ALIGNED: tl.constexpr, BITS: tl.constexpr
):
    """float32, of the flat elements start + place, wherever they are in their groups; 0 where none
    is ``inside``. ALIGNED: every start is the first element of a group."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS  # bits that stand in planes
    place = place.to(tl.uint32)  # whose quotients are shifts
    if not ALIGNED:
        place += (start % 64).to(tl.uint32)
    first, group = start // 64, place // 64
    row, lane = codes_ptr + first * (8 * BITS), place % 64
    byte = tl.load(row + (group * (8 * BITS) + lane % (8 * LOW)), mask=inside, other=0)
    code = (byte.to(tl.uint32) >> (lane // (8 * LOW) * LOW)) & (2**LOW - 1)
    if BITS == 3:
        byte = tl.load(row + (group * (8 * BITS) + (lane // 8 + 16)), mask=inside, other=0)
        code |= ((byte.to(tl.uint32) >> (lane % 8)) & 1) << 2
    scale, offset = split_params(tl.load(params_ptr + first + group, mask=inside, other=0))
    return code.to(tl.float32) * scale + offset


@triton.jit
def _bfloat16_down(x):
    """The largest bfloat16 not above x (float32), as float32."""
    bits = float_bits(x)
    return ((bits + ((bits >> 31) & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pack_groups(low, high, group, numel, seed, codes_ptr, params_ptr, BITS: tl.constexpr):
    """Of float32 elements the codes, and the params, which are written as split_params reads."""
    LEVELS: tl.constexpr = 2**BITS - 1
    # NaN counts as infinity, and a group with either has no scale.
    least = tl.min(tl.minimum(low, high), axis=1)
    most = tl.max(tl.maximum(_without_nan(low), _without_nan(high)), axis=1)
    offset = _bfloat16_down(least) + 0.0  # makes one zero of the two
    step = -_bfloat16_down(-tl.math.div_rn(most - offset, tl.full(most.shape, LEVELS, tl.float32)))
    scale = tl.maximum(step, 1.1754943508222875e-38)  # 2^-126
    reach = offset + scale * LEVELS  # beyond float32, so would be what is near it
    whole = tl.abs(reach) < float("inf")
    inverse = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    low_dither, high_dither = dither(float_bits(low), float_bits(high), group, seed)
    offsets, inverses = offset[:, None], inverse[:, None]
    low = _code((low - offsets) * inverses + low_dither, LEVELS)
    high = _code((high - offsets) * inverses + high_dither, LEVELS)
    low, high = tl.where(whole[:, None], low, 0), tl.where(whole[:, None], high, 0)
    store_codes(codes_ptr, group, numel, low, high, BITS)
    scale, offset = scale.to(tl.uint32, bitcast=True), offset.to(tl.uint32, bitcast=True)
    pair = tl.where(whole, offset | (scale >> 16), 0x7FC07FC0)
    tl.store(params_ptr + group, pair.to(tl.int32, bitcast=True), mask=group * 64 < numel)


@triton.jit
def _without_nan(x):
    return tl.where(x != x, float("inf"), x)


@triton.jit
def _code(level, TOP: tl.constexpr):
    """Of a level that is no less than 0, or NaN; int32."""
    return tl.minimum(level, TOP).to(tl.int32)


# ---------------------------------------------------------------------------------- fixed range


@triton.jit
def range_code(x, lo, hi, step, dither, BITS: tl.constexpr):
    """On 2^BITS - 1 even levels from lo to hi; the last code is for NaN."""
    inverse = tl.math.div_rn(tl.full((1, 1), 1.0, tl.float32), tl.full((1, 1), step, tl.float32))
    level = (tl.minimum(tl.maximum(x, lo), hi) - lo) * inverse + dither
    return tl.where(x != x, 2**BITS - 1, _code(level, 2**BITS - 2))


@triton.jit
def range_value(code, lo, step, BITS: tl.constexpr):
    return tl.where(code == 2**BITS - 1, float("nan"), code.to(tl.float32) * step + lo)


# --------------------------------------------------------------------------------------- dither


@triton.jit
def float_bits(x):
    """int32, of float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def one_nan(x):
    """The bits of x, which are the same for all that is not a number."""
    return tl.where(x != x, 0x7FC00000, float_bits(x))


@triton.jit
def dither(low_bits, high_bits, group, seed):
    """Numbers in (0, 1) for both halves: a hash of the seed, the place and the group's bits."""
    key = tl.sum(low_bits + high_bits, axis=1).to(tl.uint32) + seed.to(tl.uint32)
    counter = group.to(tl.uint32)[:, None] * 32 + tl.arange(0, 32).to(tl.uint32)[None, :]
    h = key[:, None] ^ (counter * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    return _uniform(h << 7), _uniform(h >> 9)


@triton.jit
def _uniform(h):
    """(n + 0.5) / 2^16 for the 16 bits n that stand in the upper part of a mantissa."""
    one = ((h & 0x007FFF80) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + n / 2^16
    return one + (2.0**-17 - 1.0)
