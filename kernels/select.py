"""Elements whose bit is set, side by side and apart again, in Triton.

``bits_select``  values = x[bits], in order.
``bits_expand``  x[bits] = values, and 0 elsewhere.

A program works on a tile [BLOCK, 8]: a row is one byte of bits and its eight elements. Where the
values of a program begin is the number of bits set before it: a first kernel counts them program by
program, and torch.cumsum adds them up. Nothing waits for the host, so that the number of values
given is not compared with the number of bits set; nothing is read or written beyond it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_devices, check_floating

BLOCK = 256
"""Bytes of bits that a program works on."""


@triton.jit
def ranks(flags):
    """How many flags [rows, columns] are set, 0 or 1, up to each one and with it, row by row."""
    rows = tl.sum(flags, axis=1)
    return (tl.cumsum(rows, axis=0) - rows)[:, None] + tl.cumsum(flags, axis=1)


@triton.jit
def load_flags(bits_ptr, numel, BLOCK: tl.constexpr):
    """Of a program's tile: the element, whether there is one, and its bit, 0 or 1."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 8)
    element = byte[:, None] * 8 + lane[None, :]
    inside = element < numel
    bits = tl.load(bits_ptr + byte, mask=byte * 8 < numel, other=0).to(tl.int32)
    return element, inside, tl.where(inside, (bits[:, None] >> lane[None, :]) & 1, 0)


@triton.jit
def _bits_count_kernel(bits_ptr, counts_ptr, numel, BLOCK: tl.constexpr):
    """counts[program]: how many bits of its bytes are set."""
    _, _, flags = load_flags(bits_ptr, numel, BLOCK)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(tl.sum(flags, axis=1), axis=0).to(tl.int64))


@triton.jit
def _bits_select_kernel(x_ptr, bits_ptr, ends_ptr, values_ptr, numel, count, BLOCK: tl.constexpr):
    """values[place] = x[element]; ends[program]: bits set up to the program's last one."""
    element, inside, flags = load_flags(bits_ptr, numel, BLOCK)
    place = ranks(flags) - tl.sum(tl.sum(flags, axis=1), axis=0)
    place = tl.load(ends_ptr + tl.program_id(0)) + place - 1
    x = tl.load(x_ptr + element, mask=inside, other=0)
    tl.store(values_ptr + place, x, mask=(flags != 0) & (place < count))


@triton.jit
def _bits_expand_kernel(values_ptr, bits_ptr, ends_ptr, x_ptr, numel, count, BLOCK: tl.constexpr):
    """x[element] = values[place], or 0."""
    element, inside, flags = load_flags(bits_ptr, numel, BLOCK)
    place = ranks(flags) - tl.sum(tl.sum(flags, axis=1), axis=0)
    place = tl.load(ends_ptr + tl.program_id(0)) + place - 1
    x = tl.load(values_ptr + place, mask=(flags != 0) & (place < count), other=0)
    tl.store(x_ptr + element, x, mask=inside)


def bits_select(x: Tensor, bits: Tensor, count: int) -> Tensor:
    """x, any shape -> values [count]: those whose bit is set; so many bits are set."""
    _check("bits_select", x.numel(), bits, x=x)
    values = x.new_empty((count,))
    _launch(_bits_select_kernel, x.contiguous(), bits.contiguous(), values, x.numel(), count)
    return values


def bits_expand(values: Tensor, bits: Tensor, size: list[int]) -> Tensor:
    """values [count], one for each bit set -> a tensor of shape ``size``."""
    torch._check(
        values.dim() == 1,
        lambda: f"bits_expand: expected values [count], got {tuple(values.shape)}",
    )
    x = values.new_empty(size)
    _check("bits_expand", x.numel(), bits, values=values)
    _launch(_bits_expand_kernel, values.contiguous(), bits.contiguous(), x, x.numel(), len(values))
    return x


def _launch(kernel, source: Tensor, bits: Tensor, target: Tensor, numel: int, count: int) -> None:
    if numel:
        with torch.cuda.device_of(bits):
            grid = (triton.cdiv(bits.numel(), BLOCK),)
            counts = bits.new_empty(grid, dtype=torch.int64)
            _bits_count_kernel[grid](bits, counts, numel, BLOCK=BLOCK)
            kernel[grid](source, bits, counts.cumsum(0), target, numel, count, BLOCK=BLOCK)


def _check(name: str, numel: int, bits: Tensor, **elements: Tensor) -> None:
    check_devices(name, **elements, bits=bits)
    check_floating(name, **elements)
    torch._check(
        bits.dtype == torch.uint8 and bits.numel() == triton.cdiv(numel, 8),
        lambda: (
            f"{name}: {numel} elements need {triton.cdiv(numel, 8)} uint8 of bits, "
            f"got {bits.numel()} {bits.dtype}"
        ),
    )
