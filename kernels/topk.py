"""Top-k by magnitude in blocks of 256, in Triton.

``topk_pack``         the k largest of every block of a row, k_tail of a shorter last one.
``topk_pack_sample``  the k largest of every row, and how many of them a block has.
``topk_unpack``       the dense rows, zero where nothing was kept.

The bits of |x|, read as a number, are in the order of the magnitudes: that is an element's key, of
15 bits for a 16-bit x, of 31 else. A program is one warp and works on one block, eight elements a
thread, so that what it counts and ranks is in registers, and no warp waits for another.

``topk_pack`` finds the k-th largest key of a block by halving the range in which it is, first the
four binades below the largest key. It stops as soon as exactly k keys reach the middle; else ties
are cut by position. x is read once, and what is kept is written once; but all keys are counted some
nine times if x is normal, so that instructions bound it, not bytes.

``topk_pack_sample`` finds the k-th largest key of a row digit by digit, 8 bits each: a kernel
counts, with many programs a row, the next digit of those keys that begin with the digits found,
and a program a row chooses. Another counts what is above the threshold and what is equal in every
block, torch.cumsum adds that up, and then a block is written as above. x is read once a digit (2
for 16 bits, else 4) and twice more. Nothing waits for the host.

``topk_unpack`` turns positions into bits, 8 words a block, and bits into ranks, by which an element
finds its value. It reads what was kept and writes the dense rows, once.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtl._ops import BLOCK, VALUE_DTYPES, ceil_div

from .common import check_devices, check_floating

DIGIT = 8
"""Bits: 256 counts; those of a longer digit would be as many as the elements of a few blocks."""
TILE, TILES = 2048, 8
"""Elements that a program counts at once, and how often it does, for one addition to the counts of
its row."""
ENTRIES = 32
"""Positions of a block that are turned into bits at once."""
WARP = {"num_warps": 1}
INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
INFINITE |= dict.fromkeys((torch.float32, torch.float64), 0x7F800000)
"""Infinity's key, by the dtype of x."""
NEAR = {torch.bfloat16: 4 << 7, torch.float16: 4 << 10}
NEAR |= dict.fromkeys((torch.float32, torch.float64), 4 << 23)
"""How far below the largest key the k-th is sought first."""


@triton.jit
def key_of(x):
    """The bits of |x|, in int32; float64 is rounded to float32 first."""
    if x.dtype == tl.float64:
        x = x.to(tl.float32)
    if x.dtype == tl.float32:
        key = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        key = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return key


@triton.jit
def place_of(n, blocks):
    """Of the program's block: its row, its number in the row, of ``blocks``, and how many elements
    it has."""
    program = tl.program_id(0)
    row = program // blocks
    block = program - row * blocks
    row, block = row.to(tl.int64), block.to(tl.int64)
    return row, block, tl.minimum(n - block * 256, 256).to(tl.int32)


@triton.jit
def load_block(x_ptr, row, block, size, n):
    """The block, and its keys: -1 beyond its end."""
    lane = tl.arange(0, 256)
    x = tl.load(x_ptr + row * n + block * 256 + lane, mask=lane < size, other=0)
    return x, tl.where(lane < size, key_of(x), -1)


@triton.jit
def total(flags):
    """How many are set."""
    return tl.sum(flags.to(tl.int32), axis=0)


@triton.jit
def write(
    x,
    key,
    threshold,
    ties,
    start,
    row,
    block,
    size,
    n,
    blocks,
    values_ptr,
    positions_ptr,
    scale_ptr,
    INFINITE: tl.constexpr,
    BITMAP: tl.constexpr,
):
    """Writes what a block keeps, from ``start`` on: what is above the threshold and the first
    ``ties`` of what is equal. Gives how many those are."""
    above, equal = key > threshold, key == threshold
    ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)  # two in one
    ranked = tl.minimum(ranks >> 16, ties)
    kept = above | (equal & ((ranks >> 16) == ranked))
    place = columns((ranks & 0xFFFF) + ranked - 1, x.dtype)
    if scale_ptr is not None:
        largest = tl.max(tl.where(kept & (key < INFINITE), key, 0), axis=0)
        step = step_of(magnitude_of(largest, x.dtype))
        # bfloat16 is the upper half of float32, so no rounding is left to be done.
        bits = (step.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
        tl.store(scale_ptr + row * blocks + block, bits)
        value = tl.where(key > INFINITE, -128, code_of(x.to(tl.float32), step))
    else:
        value = x.to(tl.float32)
    value, mask = columns(value, x.dtype), columns(kept, x.dtype)
    tl.store(values_ptr + start + place, value.to(values_ptr.dtype.element_ty), mask=mask)
    if BITMAP:
        bits = tl.reshape(kept.to(tl.int32), (32, 8)) << tl.arange(0, 8)[None, :]
        byte = tl.arange(0, 32)
        positions_ptr += row * ((n - 1) // 8 + 1) + block * 32
        tl.store(positions_ptr + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte * 8 < size)
    else:
        lane = columns(tl.arange(0, 256), x.dtype).to(tl.uint8)
        tl.store(positions_ptr + start + place, lane, mask=mask)
    return total(kept)


@triton.jit
def columns(x, dtype: tl.constexpr):
    """[256] -> [8, 32], a column being what a thread has of a block of ``dtype``, read 16 bytes at
    a time. Stores of such go where they go without an exchange between threads."""
    EACH: tl.constexpr = 128 // dtype.primitive_bitwidth
    x = tl.permute(tl.reshape(x, (8 // EACH, 32, EACH)), (0, 2, 1))
    return tl.reshape(x, (8, 32))


@triton.jit
def magnitude_of(key, dtype: tl.constexpr):
    """The float32 |x| of a key of x of ``dtype``."""
    if dtype == tl.bfloat16:
        x = (key << 16).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        x = key.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = key.to(tl.float32, bitcast=True)
    return x


@triton.jit
def step_of(largest):
    """largest / 126 rounded up to bfloat16, at least 2**-126: by its bits, exact everywhere."""
    step = tl.div_rn(largest, tl.full(largest.shape, 126.0, tl.float32))
    bits = (step.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    return tl.maximum(bits, 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def code_of(x, step):
    """x / step rounded to an integer, halves to even, in [-127, 127]. float32 numbers from 2**23 to
    2**24 are the integers, so that the sum with one in the middle is rounded to such."""
    x = tl.minimum(tl.maximum(tl.div_rn(x, step), -127.0), 127.0) + 12582912.0
    return x.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _topk_pack_kernel(
    x_ptr,
    values_ptr,
    positions_ptr,
    scale_ptr,
    n,
    blocks,
    kept,
    k,
    k_tail,
    INFINITE: tl.constexpr,
    NEAR: tl.constexpr,
    BITMAP: tl.constexpr,
):
    row, block, size = place_of(n, blocks)
    x, key = load_block(x_ptr, row, block, size, n)
    quota = tl.where(size < 256, k_tail, k)
    low, high, reached = 0, tl.max(key, axis=0), size
    middle = high - tl.minimum(high, NEAR)
    while (low < high) & (reached > quota):
        count = total(key >= middle)
        enough = count >= quota
        reached = tl.where(enough, count, reached)
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
        middle = high - ((high - low) >> 1)
    ties = quota - total(key > low)
    write(
        x,
        key,
        low,
        ties,
        row * kept + block * k,
        row,
        block,
        size,
        n,
        blocks,
        values_ptr,
        positions_ptr,
        scale_ptr,
        INFINITE,
        BITMAP,
    )


@triton.jit
def _topk_digit_kernel(
    x_ptr,
    found_ptr,
    counts_ptr,
    n,
    parts,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """counts[row, d] += keys of digit d (BITS bits above SHIFT others) that begin with
    found[row, 0]; of a row, a program takes one of ``parts``."""
    program = tl.program_id(0)
    row, part = (program // parts).to(tl.int64), (program % parts).to(tl.int64)
    prefix = tl.load(found_ptr + row * 2)
    counts = tl.zeros((BINS,), tl.int32)
    for tile in range(TILES):
        column = part * (TILE * TILES) + tile * TILE + tl.arange(0, TILE)
        key = key_of(tl.load(x_ptr + row * n + column, mask=column < n, other=0))
        counted = (column < n) & ((key >> (SHIFT + BITS)) == prefix)
        digit = (key >> SHIFT) & ((1 << BITS) - 1)
        counts += tl.histogram(digit, BINS, mask=counted)
    bins = counts_ptr + row * BINS + tl.arange(0, BINS)
    tl.atomic_add(bins, counts.to(tl.int64), mask=counts != 0, sem="relaxed")


@triton.jit
def _topk_choose_kernel(found_ptr, counts_ptr, BITS: tl.constexpr, BINS: tl.constexpr):
    """found[row]: the digits so far, and which of the keys that begin with them is sought, from the
    largest (none: the largest key there may be); both go on by a digit, and counts are 0 again."""
    row = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + row * BINS + digit)
    prefix, left = tl.load(found_ptr + row * 2), tl.load(found_ptr + row * 2 + 1)
    above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
    chosen = tl.sum((above + counts >= left).to(tl.int32), axis=0) - 1
    chosen = tl.minimum(chosen, (1 << BITS) - 1)
    above = tl.sum(tl.where(digit > chosen, counts, 0), axis=0)
    tl.store(found_ptr + row * 2, (prefix << BITS) | chosen)
    tl.store(found_ptr + row * 2 + 1, left - above)
    tl.store(counts_ptr + row * BINS + digit, tl.zeros((BINS,), tl.int64))


@triton.jit
def _topk_count_kernel(x_ptr, found_ptr, above_ptr, equal_ptr, n, blocks):
    """above[row, block], equal[row, block]: keys above the row's, and equal to it."""
    row, block, size = place_of(n, blocks)
    _, key = load_block(x_ptr, row, block, size, n)
    threshold = tl.load(found_ptr + row * 2).to(tl.int32)
    number = row * blocks + block
    tl.store(above_ptr + number, total(key > threshold).to(tl.int64))
    tl.store(equal_ptr + number, total(key == threshold).to(tl.int64))


@triton.jit
def _topk_sample_kernel(
    x_ptr,
    found_ptr,
    above_ptr,
    equal_ptr,
    values_ptr,
    positions_ptr,
    scale_ptr,
    counts_ptr,
    n,
    blocks,
    k,
    INFINITE: tl.constexpr,
    BITMAP: tl.constexpr,
):
    """above, equal: _topk_count_kernel's, summed up to a block and with it."""
    row, block, size = place_of(n, blocks)
    x, key = load_block(x_ptr, row, block, size, n)
    threshold = tl.load(found_ptr + row * 2).to(tl.int32)
    ties = tl.load(found_ptr + row * 2 + 1)
    number = row * blocks + block
    above = tl.load(above_ptr + number) - total(key > threshold)
    equal = tl.load(equal_ptr + number) - total(key == threshold)
    count = write(
        x,
        key,
        threshold,
        tl.minimum(tl.maximum(ties - equal, 0), 256).to(tl.int32),
        row * k + above + tl.minimum(equal, ties),
        row,
        block,
        size,
        n,
        blocks,
        values_ptr,
        positions_ptr,
        scale_ptr,
        INFINITE,
        BITMAP,
    )
    tl.store(counts_ptr + number, count.to(tl.int16))


@triton.jit
def _topk_unpack_kernel(
    values_ptr,
    positions_ptr,
    scale_ptr,
    counts_ptr,
    ends_ptr,
    x_ptr,
    n,
    blocks,
    kept,
    k,
    k_tail,
    BITMAP: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """ends: of a row's entries, those up to a block and with it. Whatever counts, ends and
    positions say, nothing is read beyond the row's entries."""
    row, block, size = place_of(n, blocks)
    number = row * blocks + block
    if counts_ptr is None:
        count = tl.where(size < 256, k_tail, k)
        start = block * k
    else:
        count = tl.load(counts_ptr + number).to(tl.int32)
        start = tl.load(ends_ptr + number) - count
        start = tl.minimum(tl.maximum(start, 0), kept)
        count = tl.minimum(tl.minimum(count, 256), kept - start).to(tl.int32)
    start += row * kept
    if BITMAP:
        byte = tl.arange(0, 32)
        positions_ptr += row * ((n - 1) // 8 + 1) + block * 32
        words = tl.load(positions_ptr + byte, mask=byte * 8 < size, other=0).to(tl.int32)
        flags = (words[:, None] >> tl.arange(0, 8)[None, :]) & 1
    else:
        words = tl.zeros((8,), tl.int32)
        for first in range(0, count, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            valid = entry < count
            position = tl.load(positions_ptr + start + entry, mask=valid, other=0).to(tl.int32)
            bit = tl.where(valid, 1 << (position & 31), 0)
            mine = (position >> 5)[:, None] == tl.arange(0, 8)[None, :]
            words |= tl.sum(tl.where(mine, bit[:, None], 0), axis=0)
        flags = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
    flags = tl.reshape(flags, (256,))
    rank = tl.cumsum(flags, axis=0)
    valid = (flags != 0) & (rank <= count)
    x = tl.load(values_ptr + start + (rank - 1), mask=valid, other=0).to(tl.float32)
    if scale_ptr is not None:
        x = tl.where(x == 127, float("inf"), tl.where(x == -127, float("-inf"), x))
        x = tl.where(x == -128, float("nan"), x) * tl.load(scale_ptr + number).to(tl.float32)
    lane = tl.arange(0, 256)
    x_ptr += row * n + block * 256
    tl.store(x_ptr + lane, x.to(x_ptr.dtype.element_ty), mask=lane < size)


def topk_pack(
    x: Tensor, k: int, k_tail: int, value_dtype: torch.dtype, bitmap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, n] -> values [R, K], positions, scale."""
    name = "topk_pack"
    _check_dense(name, x, value_dtype)
    rows, n = x.shape
    tail = n % BLOCK
    _check_quota(name, n, k, k_tail)
    kept = n // BLOCK * k + (k_tail if tail else 0)
    values, positions, scale = _new(x, kept, value_dtype, bitmap)
    if x.numel():
        if not tail:  # a row more or less is nothing to a block: rows of 256 need no division
            rows, n, kept = rows * (n // BLOCK), BLOCK, k
        blocks = ceil_div(n, BLOCK)
        with torch.cuda.device_of(x):
            _topk_pack_kernel[(rows * blocks,)](
                x.contiguous(),
                values,
                positions,
                _bits_of(scale),
                n,
                blocks,
                kept,
                k,
                k_tail,
                INFINITE=INFINITE[x.dtype],
                NEAR=NEAR[x.dtype],
                BITMAP=bitmap,
                **WARP,
            )
    return values, positions, scale


def topk_pack_sample(
    x: Tensor, k: int, value_dtype: torch.dtype, bitmap: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, n] -> values [R, k], positions, scale, counts [R, blocks] int16."""
    name = "topk_pack_sample"
    _check_dense(name, x, value_dtype)
    rows, n = x.shape
    torch._check_value(
        0 <= k <= n, lambda: f"{name}: expected k in [0, {n}] for x {tuple(x.shape)}, got {k}"
    )
    blocks = ceil_div(n, BLOCK)
    values, positions, scale = _new(x, k, value_dtype, bitmap)
    counts = x.new_empty((rows, blocks), dtype=torch.int16)
    if x.numel():
        x = x.contiguous()
        grid = (rows * blocks,)
        with torch.cuda.device_of(x):
            found = _find(x, k)
            numbers = x.new_empty((2, rows, blocks), dtype=torch.int64)
            _topk_count_kernel[grid](x, found, *numbers, n, blocks, **WARP)
            _topk_sample_kernel[grid](
                x,
                found,
                *numbers.cumsum(-1),
                values,
                positions,
                _bits_of(scale),
                counts,
                n,
                blocks,
                k,
                INFINITE=INFINITE[x.dtype],
                BITMAP=bitmap,
                **WARP,
            )
    return values, positions, scale, counts


def _find(x: Tensor, k: int) -> Tensor:
    """int64 [R, 2]: the key of every row's k-th largest, and how many of that key are kept."""
    rows, n = x.shape
    found = x.new_zeros((rows, 2), dtype=torch.int64)
    found[:, 1].fill_(k)
    counts = x.new_zeros((rows, 2**DIGIT), dtype=torch.int64)
    parts = ceil_div(n, TILE * TILES)
    for shift, width in _digits(x.dtype):
        digit = {"BITS": width, "BINS": 2**DIGIT}
        tiles = {"SHIFT": shift, "TILE": TILE, "TILES": TILES}
        _topk_digit_kernel[(rows * parts,)](x, found, counts, n, parts, **digit, **tiles)
        _topk_choose_kernel[(rows,)](found, counts, **digit, **WARP)
    return found


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
    """Dense [R, n] in ``dtype``."""
    check_packed("topk_unpack", values, positions, scale, counts, n, k, k_tail, bitmap)
    rows, kept = values.shape
    x = values.new_empty((rows, n), dtype=dtype)
    check_floating("topk_unpack", dense=x)
    if x.numel():
        given = counts.numel() > 0
        if not given and n % BLOCK == 0:
            rows, n, kept = rows * (n // BLOCK), BLOCK, k
        blocks = ceil_div(n, BLOCK)
        with torch.cuda.device_of(x):
            _topk_unpack_kernel[(rows * blocks,)](
                values.contiguous(),
                positions.contiguous(),
                scale.contiguous() if values.dtype == torch.int8 else None,
                counts.contiguous() if given else None,
                counts.cumsum(-1) if given else None,
                x,
                n,
                blocks,
                kept,
                k,
                k_tail,
                BITMAP=bitmap,
                ENTRIES=ENTRIES,
                **WARP,
            )
    return x


def _digits(dtype: torch.dtype) -> list[tuple[int, int]]:
    """(bits below it, bits of it) of every digit of a key, from the top."""
    ends = [*range(15 if dtype.itemsize == 2 else 31, 0, -DIGIT), 0]
    return [(low, high - low) for high, low in itertools.pairwise(ends)]


def _new(x: Tensor, kept: int, value_dtype: torch.dtype, bitmap: bool) -> tuple[Tensor, ...]:
    """values, positions and scale for x [R, n]."""
    rows, n = x.shape
    shape = (rows, ceil_div(n, BLOCK)) if value_dtype == torch.int8 else (0,)
    return (
        x.new_empty((rows, kept), dtype=value_dtype),
        x.new_empty((rows, ceil_div(n, 8) if bitmap else kept), dtype=torch.uint8),
        x.new_empty(shape, dtype=torch.bfloat16),
    )


def _bits_of(scale: Tensor) -> Tensor | None:
    """None where there is none."""
    return scale.view(torch.int16) if scale.dim() == 2 else None


def _check_dense(name: str, x: Tensor, value_dtype: torch.dtype) -> None:
    check_floating(name, x=x)
    torch._check_type(
        value_dtype in VALUE_DTYPES,
        lambda: f"{name}: expected values in float32, bfloat16, float16 or int8, got {value_dtype}",
    )
    torch._check(x.dim() == 2, lambda: f"{name}: expected x [R, n], got {tuple(x.shape)}")


def _check_quota(name: str, n: int, k: int, k_tail: int) -> None:
    tail = n % BLOCK
    torch._check_value(
        0 <= k <= BLOCK and (tail == 0 or 0 <= k_tail <= tail),
        lambda: (
            f"{name}: expected k in [0, {BLOCK}] and k_tail in [0, {tail}] for n = {n}, got {k} "
            f"and {k_tail}"
        ),
    )


def check_packed(
    name: str,
    values: Tensor,
    positions: Tensor,
    scale: Tensor,
    counts: Tensor,
    n: int,
    k: int,
    k_tail: int,
    bitmap: bool,
) -> None:
    """Raise unless these are the tensors of rows of n elements, by their shapes and dtypes."""
    check_devices(name, values=values, positions=positions, scale=scale, counts=counts)
    torch._check_type(
        values.dtype in VALUE_DTYPES,
        lambda: (
            f"{name}: expected values in float32, bfloat16, float16 or int8, got {values.dtype}"
        ),
    )
    torch._check(
        values.dim() == 2, lambda: f"{name}: expected values [R, K], got {tuple(values.shape)}"
    )
    torch._check_value(n >= 0, lambda: f"{name}: expected n of 0 or more, got {n}")
    rows, kept = values.shape

    def expect(argument: str, given: Tensor, dtype: torch.dtype, width: int) -> None:
        torch._check(
            given.dtype == dtype and given.shape == (rows, width),
            lambda: (
                f"{name}: expected {argument} {dtype} [{rows}, {width}] beside values [{rows}, "
                f"{kept}] for n = {n}, got {given.dtype} {list(given.shape)}"
            ),
        )

    expect("positions", positions, torch.uint8, ceil_div(n, 8) if bitmap else kept)
    if values.dtype == torch.int8:
        expect("scale", scale, torch.bfloat16, ceil_div(n, BLOCK))
    if counts.numel():
        expect("counts", counts, torch.int16, ceil_div(n, BLOCK))
    if not counts.numel():
        _check_quota(name, n, k, k_tail)
        quota = n // BLOCK * k + (k_tail if n % BLOCK else 0)
        torch._check(
            kept == quota,
            lambda: (
                f"{name}: expected values [{rows}, {quota}] for n = {n}, k = {k}, k_tail = "
                f"{k_tail}, got [{rows}, {kept}]"
            ),
        )
