"""One bit an element, in Triton.

``bits_pack``   bits[i // 8] |= (mask[i] != 0) << (i % 8); the last byte is filled with zeros.
``bits_apply``  y[i] = x[i] * scale where bit i % 8 of bits[i // 8] is set, else 0.

Both are bound by memory: numel bytes read and numel / 8 written; itemsize * numel and numel / 8
read and itemsize * numel written. A program works on a tile [BLOCK, 8]: a row is one byte of bits
and the eight elements it stands for, so a byte is moved once and no two programs share one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtl._ops import FLOATING

BYTES_PER_PROGRAM = 8192
"""Of mask or x: four 16-byte loads in flight for each of 128 threads."""


@triton.jit
def _bits_pack_kernel(mask_ptr, bits_ptr, numel, BLOCK: tl.constexpr):
    """bits[b] = sum over i of (mask[8 b + i] != 0) << i, for BLOCK bytes b."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 8)
    element = byte[:, None] * 8 + lane[None, :]
    mask = tl.load(mask_ptr + element, mask=element < numel, other=0)
    bits = tl.sum((mask != 0).to(tl.int32) << lane[None, :], axis=1)
    tl.store(bits_ptr + byte, bits.to(tl.uint8), mask=byte * 8 < numel)


@triton.jit
def _bits_apply_kernel(x_ptr, bits_ptr, y_ptr, scale: tl.float64, numel, BLOCK: tl.constexpr):
    """y[8 b + i] = x[8 b + i] * scale if bit i of bits[b] else 0, for BLOCK bytes b.

    The product is taken in float32, in float64 for float64, and rounded once, as torch takes it.
    """
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 8)
    element = byte[:, None] * 8 + lane[None, :]
    inside = element < numel
    bits = tl.load(bits_ptr + byte, mask=byte * 8 < numel, other=0).to(tl.int32)
    x = tl.load(x_ptr + element, mask=inside, other=0)
    if x_ptr.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    y = x * tl.full((1, 1), scale, x.dtype)
    y = tl.where((bits[:, None] >> lane[None, :]) & 1 != 0, y, 0.0)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=inside)


def _block(itemsize: int) -> int:
    """Bytes of bits that a program works on, 8 elements of ``itemsize`` bytes each."""
    return BYTES_PER_PROGRAM // (8 * itemsize)


def bits_pack(mask: Tensor) -> Tensor:
    """mask, bool, any shape -> uint8 [ceil(numel / 8)], the least significant bit first."""
    torch._check_type(
        mask.dtype == torch.bool, lambda: f"bits_pack: expected a bool tensor, got {mask.dtype}"
    )
    mask = mask.contiguous()
    bits = mask.new_empty((triton.cdiv(mask.numel(), 8),), dtype=torch.uint8)
    block = _block(mask.itemsize)
    if bits.numel():
        with torch.cuda.device_of(mask):
            grid = (triton.cdiv(bits.numel(), block),)
            _bits_pack_kernel[grid](mask.view(torch.uint8), bits, mask.numel(), BLOCK=block)
    return bits


def bits_apply(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    """x * scale where the bit is set, else 0 (also for NaN); x any shape, the result contiguous."""
    torch._check_type(
        x.dtype in FLOATING,
        lambda: f"bits_apply: expected float32, float64, bfloat16 or float16, got {x.dtype}",
    )
    torch._check(
        bits.dtype == torch.uint8 and bits.numel() == triton.cdiv(x.numel(), 8),
        lambda: (
            f"bits_apply: {x.numel()} elements need {triton.cdiv(x.numel(), 8)} uint8 of bits, "
            f"got {bits.numel()} {bits.dtype}"
        ),
    )
    x, bits = x.contiguous(), bits.contiguous()
    y = torch.empty_like(x)
    block = _block(x.itemsize)
    if x.numel():
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(bits.numel(), block),)
            _bits_apply_kernel[grid](x, bits, y, scale, x.numel(), BLOCK=block)
    return y
