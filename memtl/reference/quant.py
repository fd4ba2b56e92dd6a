"""Group-wise low-bit storage with stochastic rounding: the definition in plain PyTorch.

A group of 64 elements has an ``offset`` (its minimum, rounded down to bfloat16) and a ``scale``
(its remaining range over 2**bits - 1, rounded up to bfloat16, at least 2**-126), so that every
element lies inside [offset, offset + (2**bits - 1) scale]. bfloat16, not float16, because float32
activations beyond 65504 would overflow the latter. A group holding anything that is not finite
decodes to NaN throughout: an error is never turned into a plausible number.
"""

import math

import torch
from torch import Tensor

from .._ops import GROUP, ceil_div
from .bits import bits_pack, bits_unpack

SMALLEST_SCALE = 2.0**-126
_MASK = 0xFFFFFFFF


def bfloat16_down(x: Tensor) -> Tensor:
    """The largest bfloat16 value not above x (float32), as float32."""
    rounded = x.to(torch.bfloat16)
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.float() > x, below, rounded).float()


def bfloat16_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 value not below x (float32), as float32."""
    return -bfloat16_down(-x)


def dither(groups: Tensor, seed: int) -> Tensor:
    """Uniform numbers in (0, 1), one an element, from a hash of the seed and of the data.

    ``groups`` [G, 64] float32. With key(g) the sum of the group's float32 bit patterns and ``h``
    MurmurHash3's 32-bit finaliser of ``(seed + key(g)) ^ (32 g + lane) * 0x9E3779B1``, lanes 0..31
    take h's low and lanes 32..63 its high 16 bits. A pure function: the same data is rounded in the
    same way under gradient checkpointing and after a resume, new data in a new way, and the
    generator that dropout draws from is left alone.
    """
    key = (groups.view(torch.int32).long().sum(-1, keepdim=True) + (seed ^ (seed >> 32))) & _MASK
    lane = torch.arange(32, device=groups.device)
    counter = torch.arange(groups.shape[0], device=groups.device).unsqueeze(1) * 32 + lane
    h = key ^ ((counter & _MASK) * 0x9E3779B1 & _MASK)
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    h = h ^ (h >> 16)
    return (torch.cat((h & 0xFFFF, h >> 16), dim=1).float() + 0.5) * 2.0**-16


def in_groups(x: Tensor) -> Tensor:
    """[G, 64] float32; the last group is padded with its own last element."""
    flat = x.reshape(-1).float()
    flat = flat.masked_fill(flat.isnan(), math.nan)  # one bit pattern for all, for the dither
    pad = -flat.numel() % GROUP
    if pad:
        flat = torch.cat((flat, flat[-1:].expand(pad)))
    return flat.view(-1, GROUP)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """[G, 64] integers below 2**bits -> uint8 [G, 8 * bits]."""
    codes = codes.to(torch.uint8)
    if bits == 3:
        high = bits_pack(codes > 3).view(-1, 8)
        return torch.cat((_pack_codes(codes & 3, 2), high), dim=1)
    planes = codes.view(-1, 8 // bits, 8 * bits)
    packed = torch.zeros_like(planes[:, 0])
    for i in range(8 // bits):
        packed |= planes[:, i] << (i * bits)
    return packed


def _unpack_codes(packed: Tensor, bits: int) -> Tensor:
    if bits == 3:
        return _unpack_codes(packed[:, :16], 2) + 4 * bits_unpack(packed[:, 16:], GROUP)
    planes = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(planes, dim=1).float()


def quant_pack(x: Tensor, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """codes, params: floor((x - offset) * (1 / scale) + dither), clamped to 0 .. 2**bits - 1."""
    groups = in_groups(x)
    levels = 2**bits - 1
    finite = groups.isfinite().all(-1, keepdim=True)
    safe = torch.where(finite, groups, 0.0)
    offset = bfloat16_down(safe.amin(-1, keepdim=True)) if safe.numel() else safe[:, :1]
    offset = offset + 0.0  # never the negative zero
    top = safe.amax(-1, keepdim=True) if safe.numel() else safe[:, :1]
    scale = bfloat16_up((top - offset) / top.new_tensor(levels)).clamp_min(SMALLEST_SCALE)
    codes = ((safe - offset) * scale.reciprocal() + dither(groups, seed)).floor().clamp(0, levels)
    reach = offset + top.new_tensor(levels) * scale  # beyond float32, so would be what is near
    params = torch.cat((scale, offset), dim=1).masked_fill(~(finite & reach.isfinite()), math.nan)
    codes = codes.masked_fill(params[:, :1].isnan(), 0)
    return _pack_codes(codes, bits), params.to(torch.bfloat16)


def quant_pack_normalized(
    x: Tensor, mean: Tensor, rstd: Tensor, bits: int, inner: int, seed: int
) -> tuple[Tensor, Tensor]:
    """quant_pack of (x - mean[c]) * rstd[c]; flat element i is of channel c = (i // inner) % C, and
    there is a whole number of C * inner."""
    x_hat = x.reshape(-1).float()
    if x_hat.numel():
        mean, rstd = mean.float().reshape(-1, 1), rstd.float().reshape(-1, 1)
        x_hat = (x_hat.view(-1, len(mean), inner) - mean) * rstd
    return quant_pack(x_hat, bits, seed)


def quant_unpack(
    codes: Tensor, params: Tensor, bits: int, size: list[int], dtype: torch.dtype
) -> Tensor:
    """offset + code * scale, computed in float32."""
    scale, offset = params.float().split(1, dim=1)
    x = _unpack_codes(codes, bits) * scale + offset
    return x.reshape(-1)[: math.prod(size)].view(size).to(dtype)


def quant_pack_range(x: Tensor, bits: int, lo: float, hi: float, seed: int) -> Tensor:
    """Codes 0 .. 2**bits - 2 on even levels over [lo, hi]; the last code stands for NaN."""
    groups = in_groups(x)
    return range_codes(groups, bits, lo, hi, dither(groups, seed))


def range_codes(groups: Tensor, bits: int, lo: float, hi: float, dither: Tensor) -> Tensor:
    """quant_pack_range of groups [G, 64] float32, with a dither given."""
    step = _range_step(bits, lo, hi, groups)
    low = groups.new_tensor(lo)
    clamped = groups.clamp(low, groups.new_tensor(hi)).nan_to_num(0.0)
    codes = ((clamped - low) * step.reciprocal() + dither).floor()
    codes = codes.clamp(0, 2**bits - 2)
    return _pack_codes(codes.masked_fill(groups.isnan(), 2**bits - 1), bits)


def quant_unpack_range(
    codes: Tensor, bits: int, lo: float, hi: float, size: list[int], dtype: torch.dtype
) -> Tensor:
    """lo + code * step, NaN for the last code; computed in float32."""
    level = _unpack_codes(codes, bits)
    x = level * _range_step(bits, lo, hi, level) + level.new_tensor(lo)
    x = x.masked_fill(level == 2**bits - 1, math.nan)
    return x.reshape(-1)[: math.prod(size)].view(size).to(dtype)


def _range_step(bits: int, lo: float, hi: float, like: Tensor) -> Tensor:
    return like.new_tensor((hi - lo) / (2**bits - 2))


def packed_bytes(numel: int, bits: int, *, params: bool) -> int:
    """Bytes of ``numel`` packed elements: 8 * bits a group of 64, and 4 for scale and offset."""
    return ceil_div(numel, GROUP) * (8 * bits + (4 if params else 0))
