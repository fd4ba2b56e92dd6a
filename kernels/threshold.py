"""The k largest magnitudes of many tensors, in Triton.

``threshold_magnitude``  the k-th largest |x| and how many that equal it are among the k.
``threshold_mask``       the bits of what is above, and of the first that are equal.

The bits of |x|, read as a number, are in the order of the magnitudes: that is an element's key; NaN
has the first one behind infinity's. The k-th largest key is found digit by digit, 11 bits each,
from the top: a kernel counts, over all tensors, the next digit of those keys that begin with the
digits found, and a program of its own chooses the digit. What is found stays on the device, and
nothing waits for the host; so k is not compared with the number of bits set in the masks.

Bound by reading the tensors, once a digit and once for the ties: 3 digits for float32, 6 for
float64, 2 for 16 bits. Extra memory: 16 KB, and 8 bytes a tensor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_devices, check_floating
from .select import load_flags, ranks

DIGIT = 11
"""Bits."""
TILE, TILES = 2048, 8
"""Elements that a program reads at once, and how often it does, for one addition to global counts
of each digit."""
MARKED = 256
"""Bytes of bits that a program makes."""

INTEGERS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""The integer of a dtype's size, and infinity's key."""


@triton.jit
def _key(bits, INFINITE: tl.constexpr):
    """Of the integer that has an element's bits."""
    positive = (1 << (bits.dtype.primitive_bitwidth - 1)) - 1
    key = bits & tl.full((), positive, bits.dtype)
    return tl.minimum(key, tl.full((), INFINITE + 1, bits.dtype))


@triton.jit
def _digit_kernel(
    x_ptr,
    mask_ptr,
    found_ptr,
    counts_ptr,
    numel,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    INFINITE: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """counts[d] += keys of digit d (BITS bits above SHIFT others) that begin with found[0]."""
    start = tl.program_id(0).to(tl.int64) * (TILE * TILES)
    prefix = tl.load(found_ptr)
    counts = tl.zeros((BINS,), tl.int32)
    for tile in range(TILES):
        element = start + tile * TILE + tl.arange(0, TILE)
        counted = element < numel
        key = _key(tl.load(x_ptr + element, mask=counted, other=0), INFINITE)
        if mask_ptr is not None:
            byte = tl.load(mask_ptr + element // 8, mask=counted, other=0).to(tl.int64)
            counted &= (byte >> (element % 8)) & 1 != 0
        key = key.to(tl.int64)
        counted &= (key >> (SHIFT + BITS)) == prefix
        digit = (key >> SHIFT) & ((1 << BITS) - 1)
        counts += tl.histogram(digit.to(tl.int32), BINS, mask=counted)
    bins = counts_ptr + tl.arange(0, BINS)
    tl.atomic_add(bins, counts.to(tl.int64), mask=counts != 0, sem="relaxed")


@triton.jit
def _choose_kernel(found_ptr, counts_ptr, BITS: tl.constexpr, BINS: tl.constexpr):
    """found: the digits so far, and which of the keys that begin with them is sought, from the
    largest; both go on by a digit, and counts are 0 again."""
    digit = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + digit)
    prefix, left = tl.load(found_ptr), tl.load(found_ptr + 1)
    above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
    chosen = (above < left) & (left <= above + counts)
    tl.store(found_ptr, (prefix << BITS) + tl.sum(tl.where(chosen, digit, 0), axis=0).to(tl.int64))
    tl.store(found_ptr + 1, left - tl.sum(tl.where(chosen, above, 0), axis=0))
    tl.store(counts_ptr + digit, tl.zeros((BINS,), tl.int64))


@triton.jit
def _equal_kernel(
    x_ptr,
    mask_ptr,
    key_ptr,
    counts_ptr,
    numel,
    INFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[program]: elements of its tile [BLOCK, 8] that have the key."""
    element, inside, flags = _flags(mask_ptr, numel, BLOCK)
    key = _key(tl.load(x_ptr + element, mask=inside, other=0), INFINITE)
    equal = flags * (key.to(tl.int64) == tl.load(key_ptr)).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(tl.sum(equal, axis=1), axis=0).to(tl.int64))


@triton.jit
def _mark_kernel(
    x_ptr,
    mask_ptr,
    key_ptr,
    ties_ptr,
    ends_ptr,
    bits_ptr,
    numel,
    INFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """bits of a tile; ends[program]: how many up to the program's last element have the key."""
    element, inside, flags = _flags(mask_ptr, numel, BLOCK)
    key = _key(tl.load(x_ptr + element, mask=inside, other=0), INFINITE).to(tl.int64)
    threshold = tl.load(key_ptr)
    equal = flags * (key == threshold).to(tl.int32)
    rank = ranks(equal) - tl.sum(tl.sum(equal, axis=1), axis=0)
    rank = tl.load(ends_ptr + tl.program_id(0)) + rank
    kept = (flags != 0) & ((key > threshold) | ((equal != 0) & (rank <= tl.load(ties_ptr))))
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.sum(kept.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bits_ptr + byte, bits.to(tl.uint8), mask=byte * 8 < numel)


@triton.jit
def _flags(mask_ptr, numel, BLOCK: tl.constexpr):
    """As load_flags, and without a mask 1 for every element there is."""
    if mask_ptr is not None:
        element, inside, flags = load_flags(mask_ptr, numel, BLOCK)
    else:
        byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        element = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        inside = element < numel
        flags = inside.to(tl.int32)
    return element, inside, flags


def _digits(dtype: torch.dtype) -> list[tuple[int, int]]:
    """(bits below it, bits of it) of every digit of a key, from the top."""
    below, digits = 8 * dtype.itemsize - 1, []
    while below:
        bits = min(below, DIGIT)
        below -= bits
        digits.append((below, bits))
    return digits


def threshold_magnitude(xs: list[Tensor], masks: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest magnitude, 0-dim, and ties, int64 [len(xs)]."""
    _check_lists(xs, masks, k)
    integer, infinite = INTEGERS[xs[0].dtype]
    if k == 0:
        ties = xs[0].new_zeros((len(xs),), dtype=torch.int64)
        return xs[0].new_full((), torch.inf), ties
    found, counts = (xs[0].new_zeros((n,), dtype=torch.int64) for n in (2, 2**DIGIT))
    found[1:].fill_(k)  # no copy from the host, which a graph could not capture
    read = [x.contiguous().view(integer) for x in xs]
    bits: list[Tensor | None] = [mask.contiguous() for mask in masks] or [None] * len(xs)
    with torch.cuda.device_of(xs[0]):
        for shift, width in _digits(xs[0].dtype):
            for x, mask in zip(read, bits, strict=True):
                grid = (triton.cdiv(x.numel(), TILE * TILES),)
                options = {"SHIFT": shift, "BITS": width, "INFINITE": infinite}
                options |= {"BINS": 2**DIGIT, "TILE": TILE, "TILES": TILES}
                if x.numel():
                    _digit_kernel[grid](x, mask, found, counts, x.numel(), **options)
            _choose_kernel[(1,)](found, counts, BITS=width, BINS=2**DIGIT)
        key, left = found.unbind()
        equal = torch.stack(
            [_equal(x, m, key, infinite).sum() for x, m in zip(read, bits, strict=True)]
        )
    value = torch.where(key > infinite, torch.nan, key.to(integer).view(xs[0].dtype))
    return value, (left - (equal.cumsum(0) - equal)).clamp(min=0).minimum(equal)


def threshold_mask(x: Tensor, mask: Tensor | None, value: Tensor, ties: Tensor) -> Tensor:
    """x, any shape -> uint8 [ceil(numel / 8)]."""
    name = "threshold_mask"
    check_devices(name, x=x, mask=mask, value=value, ties=ties)
    _check_x(name, x, mask)
    torch._check_type(
        value.dtype == x.dtype and ties.dtype == torch.int64,
        lambda: (
            f"{name}: expected value in {x.dtype}, as x, and ties in torch.int64, got "
            f"{value.dtype} and {ties.dtype}"
        ),
    )
    torch._check(
        value.numel() == 1 and ties.numel() == 1,
        lambda: (
            f"{name}: expected one value and one number of ties, got {tuple(value.shape)} and "
            f"{tuple(ties.shape)}"
        ),
    )
    integer, infinite = INTEGERS[x.dtype]
    bits = x.new_empty((triton.cdiv(x.numel(), 8),), dtype=torch.uint8)
    if x.numel():
        read, mask = x.contiguous().view(integer), None if mask is None else mask.contiguous()
        key = value.abs().reshape(()).view(integer).clamp(max=infinite + 1).to(torch.int64)
        with torch.cuda.device_of(x):
            ends = _equal(read, mask, key, infinite).cumsum(0)
            grid = (len(ends),)
            options = {"INFINITE": infinite, "BLOCK": MARKED}
            _mark_kernel[grid](read, mask, key, ties, ends, bits, x.numel(), **options)
    return bits


def _equal(x: Tensor, mask: Tensor | None, key: Tensor, infinite: int) -> Tensor:
    """How many elements have the key, tile by tile."""
    grid = (triton.cdiv(triton.cdiv(x.numel(), 8), MARKED),)
    counts = x.new_empty(grid, dtype=torch.int64)
    if x.numel():
        _equal_kernel[grid](x, mask, key, counts, x.numel(), INFINITE=infinite, BLOCK=MARKED)
    return counts


def _check_lists(xs: list[Tensor], masks: list[Tensor], k: int) -> None:
    name = "threshold_magnitude"
    torch._check(
        len(masks) in (0, len(xs)),
        lambda: f"{name}: expected no masks, or {len(xs)} as there are tensors, got {len(masks)}",
    )
    lists = {"xs": xs, "masks": masks}
    check_devices(name, **{f"{a}[{i}]": t for a, ts in lists.items() for i, t in enumerate(ts)})
    for i, x in enumerate(xs):
        _check_x(name, x, masks[i] if masks else None)
        torch._check_type(
            x.dtype == xs[0].dtype,
            lambda: f"{name}: expected tensors of one dtype, got {[x.dtype for x in xs]}",
        )
    numel = sum(x.numel() for x in xs)
    torch._check_value(
        0 <= k <= numel,
        lambda: f"{name}: expected k from 0 to {numel}, as there are elements, got {k}",
    )


def _check_x(name: str, x: Tensor, mask: Tensor | None) -> None:
    check_floating(name, x=x)
    if mask is not None:
        torch._check(
            mask.dtype == torch.uint8 and mask.numel() == triton.cdiv(x.numel(), 8),
            lambda: (
                f"{name}: {x.numel()} elements need {triton.cdiv(x.numel(), 8)} uint8 of bits, "
                f"got {mask.numel()} {mask.dtype}"
            ),
        )
