"""Top-k by magnitude in blocks of 256: the definition in plain PyTorch.

Magnitudes are ordered by the bit pattern of |x| in float32, so infinities rank above every finite
value and NaN above them: what is not finite is always kept. Ties are cut by position, the first
ones staying, so that exactly the quota is kept.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._ops import BLOCK, ceil_div
from .bits import bits_pack, bits_unpack
from .quant import SMALLEST_SCALE, bfloat16_up

LARGEST_CODE = 126
"""int8 codes of finite values; 127 and -127 are the infinities, -128 is NaN."""


def _largest(x: Tensor, k: int) -> Tensor:
    """bool mask [R, n] of each row's k largest magnitudes, ties cut by position."""
    key = x.float().abs().view(torch.int32)
    order = key.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter_(1, order, True)


def _quota_mask(x: Tensor, k: int, k_tail: int) -> Tensor:
    rows, n = x.shape
    full = n - n % BLOCK
    head = _largest(x[:, :full].reshape(rows * (full // BLOCK), BLOCK), k).view(rows, full)
    return torch.cat((head, _largest(x[:, full:], k_tail)), dim=1)


def _blocks(x: Tensor) -> Tensor:
    """[R, n] -> [R, blocks, 256], the last block filled with zeros."""
    rows, n = x.shape
    return F.pad(x, (0, -n % BLOCK)).view(rows, ceil_div(n, BLOCK), BLOCK)


def _emit(x: Tensor, mask: Tensor, kept: int, value_dtype: torch.dtype, bitmap: bool):
    """Values, positions and scale of the masked entries; every row keeps ``kept``."""
    rows, n = x.shape
    x = x.float()
    column = mask.nonzero()[:, 1].view(rows, kept)
    values = x.gather(1, column)
    scale = x.new_empty((0,), dtype=torch.bfloat16)
    if value_dtype == torch.int8:
        finite = torch.where(mask & x.isfinite(), x.abs(), 0.0)
        largest = _blocks(finite).amax(-1) if n else finite
        step = bfloat16_up(largest / LARGEST_CODE).clamp_min(SMALLEST_SCALE)
        codes = (values / step.gather(1, column // BLOCK)).round().clamp(-126, 126)
        codes = torch.where(values.isinf(), values.sign() * 127, codes)
        values = codes.masked_fill(values.isnan(), -128)
        scale = step.to(torch.bfloat16)
    positions = (
        torch.stack([bits_pack(row) for row in mask])
        if bitmap and rows
        else column.remainder(BLOCK).to(torch.uint8)
    )
    if bitmap and not rows:
        positions = positions.new_empty((0, ceil_div(n, 8)))
    return values.to(value_dtype), positions, scale


def topk_pack(
    x: Tensor, k: int, k_tail: int, value_dtype: torch.dtype, bitmap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of every 256-block of x [R, n], k_tail of a shorter last one."""
    kept = x.shape[1] // BLOCK * k + (k_tail if x.shape[1] % BLOCK else 0)
    return _emit(x, _quota_mask(x, k, k_tail), kept, value_dtype, bitmap)


def topk_pack_sample(
    x: Tensor, k: int, value_dtype: torch.dtype, bitmap: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest of every row of x [R, n]: Back Razor's threshold over a whole sample."""
    mask = _largest(x, k)
    counts = _blocks(mask).sum(-1, dtype=torch.int16)
    return *_emit(x, mask, k, value_dtype, bitmap), counts


def _columns(values, positions, counts, n: int, k: int, k_tail: int, bitmap: bool) -> Tensor:
    """Column of every kept entry, [R, K]."""
    rows, kept = values.shape
    if rows == 0:
        return values.new_empty((0, kept), dtype=torch.int64)
    if bitmap:
        return bits_unpack(positions, n).nonzero()[:, 1].view(rows, kept)
    blocks = torch.arange(ceil_div(n, BLOCK), device=values.device)
    if counts.numel():
        block = blocks.repeat(rows).repeat_interleave(counts.flatten().long()).view(rows, kept)
    else:
        quota = torch.full_like(blocks, k)
        if n % BLOCK:
            quota[-1] = k_tail
        block = blocks.repeat_interleave(quota).expand(rows, kept)
    return block * BLOCK + positions


def topk_unpack(
    values: Tensor,
    positions: Tensor,
    scale: Tensor,
    counts: Tensor,
    n: int,
    k: int,
    k_tail: int,
    bitmap: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Dense [R, n], zero where nothing was kept."""
    column = _columns(values, positions, counts, n, k, k_tail, bitmap)
    decoded = values.float()
    if values.dtype == torch.int8:
        decoded = torch.where(decoded.abs() == 127, decoded.sign() * torch.inf, decoded)
        decoded = decoded.masked_fill(values == -128, torch.nan)
        decoded = decoded * scale.float().gather(1, column // BLOCK)
    dense = values.new_zeros((values.shape[0], n), dtype=torch.float32)
    return dense.scatter_(1, column, decoded).to(dtype)


def topk_weight_grad(
    values: Tensor,
    positions: Tensor,
    scale: Tensor,
    counts: Tensor,
    grad_out: Tensor,
    n: int,
    features: int,
    k: int,
    k_tail: int,
    bitmap: bool,
) -> Tensor:
    """grad_out^T x [O, D], x [T, D] being the unpacked tensor; accumulated in float32.

    On a GPU x may be rounded to a 16-bit grad_out's dtype first, as torch's own gradient reads it.
    """
    x = topk_unpack(values, positions, scale, counts, n, k, k_tail, bitmap, torch.float32)
    return grad_out.float().t() @ x.view(grad_out.shape[0], features)


def topk_conv_weight_grad(
    values: Tensor,
    positions: Tensor,
    scale: Tensor,
    counts: Tensor,
    grad_out: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    k: int,
    k_tail: int,
    bitmap: bool,
) -> Tensor:
    """What torch gives for the unpacked input [B, *input_size]; accumulated in float32.

    On a GPU it may be that in a 16-bit grad_out's dtype, some samples at a time.
    """
    channels, *spatial = input_size
    n = math.prod(input_size)
    x = topk_unpack(values, positions, scale, counts, n, k, k_tail, bitmap, torch.float32)
    if channels_last:
        x = x.view(-1, *spatial, channels).movedim(-1, 1)
    else:
        x = x.view(-1, channels, *spatial)
    weight = x.new_empty((1,)).expand(grad_out.shape[1], channels, *kernel_size)
    geometry = stride, padding, dilation, False, [0] * len(spatial), 1
    return torch.ops.aten.convolution_backward(
        grad_out.float(), x, weight, None, *geometry, [False, True, False]
    )[1].contiguous()
