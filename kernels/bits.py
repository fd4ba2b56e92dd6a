"""One bit an element, in Triton.

``bits_pack``   bits[i // 8] |= (mask[i] != 0) << (i % 8); the last byte is filled with zeros.
``bits_pack_between``  the same of the mask that is set unless x[i] <= lo or x[i] >= hi.
``bits_apply``  y[i] = x[i] * scale where bit i % 8 of bits[i // 8] is set, else 0.

All are bound by memory: numel bytes, or itemsize * numel, read and numel / 8 written; itemsize *
numel and numel / 8 read and itemsize * numel written. A program works on a tile [BLOCK, 8]: a row
is one byte of bits and the eight elements it stands for, so a byte is moved once and no two
programs share one.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_devices, check_floating

BYTES_PER_PROGRAM = 8192
"""Of mask or x: four 16-byte loads in flight for each of 128 threads."""


@triton.jit
def _bytes(mask):
    """A byte for each row of eight."""
    bits = mask.to(tl.int32) << tl.arange(0, 8)[None, :]
    return tl.sum(bits, axis=1).to(tl.uint8)


@triton.jit
def _bits_pack_kernel(mask_ptr, bits_ptr, numel, BLOCK: tl.constexpr):
    """bits[b] = sum over i of (mask[8 b + i] != 0) << i, for BLOCK bytes b."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = tl.load(mask_ptr + element, mask=element < numel, other=0)
    tl.store(bits_ptr + byte, _bytes(mask != 0), mask=byte * 8 < numel)


@triton.jit
def _bits_pack_between_kernel(
    x_ptr, bits_ptr, lo: tl.float64, hi: tl.float64, numel, BLOCK: tl.constexpr
):
    """Bit i of bits[b] is set unless x[8 b + i] <= lo or >= hi, for BLOCK bytes b."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = element < numel
    x = tl.load(x_ptr + element, mask=inside, other=0)
    if x_ptr.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    outside = (x <= tl.full((1, 1), lo, x.dtype)) | (x >= tl.full((1, 1), hi, x.dtype))
    tl.store(bits_ptr + byte, _bytes(inside & (outside == 0)), mask=byte * 8 < numel)


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


def _bound(value: float | None, dtype: torch.dtype) -> float:
    """As torch compares a tensor with it, rounded to its dtype; NaN, which nothing is beyond, for
    none."""
    return math.nan if value is None else torch.tensor(value, dtype=dtype, device="cpu").item()


def bits_pack_between(x: Tensor, lo: float | None, hi: float | None) -> Tensor:
    """x, any shape -> uint8 [ceil(numel / 8)]: set unless x <= lo or x >= hi, so where x is NaN."""
    check_floating("bits_pack_between", x=x)
    x = x.contiguous()
    bits = x.new_empty((triton.cdiv(x.numel(), 8),), dtype=torch.uint8)
    block = _block(x.itemsize)
    if bits.numel():
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(bits.numel(), block),)
            bounds = _bound(lo, x.dtype), _bound(hi, x.dtype)
            _bits_pack_between_kernel[grid](x, bits, *bounds, x.numel(), BLOCK=block)
    return bits


def bits_apply(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    """x * scale where the bit is set, else 0 (also for NaN); x any shape, the result contiguous."""
    check_devices("bits_apply", x=x, bits=bits)
    check_floating("bits_apply", x=x)
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
