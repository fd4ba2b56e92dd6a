"""The threshold family in C++, and selecting by bits, against the reference, for every instruction
set: tensors that need more than one reading, samples that mislead, ties over many parts."""

import math

import pytest
import torch

import memtl
from memtl import reference
from tests.helpers import assert_same

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ops = torch.ops.memtl
MANY = 300_007
"""More than a part, and more elements of any dtype than are searched as candidates at once."""


def draw(kind, dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(MANY, generator=generator, dtype=torch.float64)
    if kind == "wide":
        x = x.sign() * torch.exp(8 * x)
    elif kind == "pruned":
        x[torch.rand(MANY, generator=generator) < 0.9] = 0.0
    elif kind == "few":
        x = (x * 2).round()
    elif kind == "constant":
        x.fill_(-0.7)
    elif kind == "near":  # of a hundred octaves only one is there, of it a few last bits
        x = 1 + x * 2.0**-19
    elif kind == "broken":
        x[::3], x[1::5], x[2::7] = math.nan, math.inf, -math.inf
    return x.to(dtype)


def check(xs, masks, k):
    got, wanted = (
        f(xs, masks, k) for f in (ops.threshold_magnitude, reference.threshold_magnitude)
    )
    assert_same(got[0], wanted[0])
    assert_same(got[1], wanted[1])
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "wide", "pruned", "few", "constant", "near", "broken"])
def test_large_tensors(isa, dtype, kind):
    x = draw(kind, dtype)
    xs = [x[:10], x[10:150_010].view(-1, 100), x[150_010:]]
    masks = [ops.bits_pack(torch.rand(t.shape) < 0.8) for t in xs]
    for k, given in ((1, []), (MANY // 3, masks), (MANY - 5, [])):
        value, ties = check(xs, given, k)
        kept = 0
        for i, t in enumerate(xs):
            mask = given[i] if given else None
            bits = ops.threshold_mask(t, mask, value, ties[i])
            assert torch.equal(bits, reference.threshold_mask(t, mask, value, ties[i]))
            kept += memtl.functional.count_bits(bits)
        assert kept == k


def test_a_sample_that_misleads(isa):
    """Short tensors are hardly sampled: what is large stands in these alone."""
    xs = [torch.randn(200_000) * 1e-3, *(100 + torch.randn(50) for _ in range(400))]
    for k in (10_000, 20_000, 20_001):
        check(xs, [], k)


def test_ties_run_out_in_the_middle_of_a_part(isa):
    x = torch.ones(600_000)
    x[::3] = 0.5
    for ties in (0, 1, 262_144, 262_145, 400_000):
        bits = ops.threshold_mask(x, None, torch.tensor(1.0), torch.tensor([ties]))
        assert torch.equal(bits, reference.threshold_mask(x, None, x[1], torch.tensor(ties)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 9, 63, 64, 65, 1000, 70_001])
def test_select_and_expand(isa, dtype, n):
    x = torch.randn(n).to(dtype)
    for density in (0.0, 0.03, 0.5, 1.0):
        mask = torch.rand(n) < density
        bits = reference.bits_pack(mask)
        if n % 8:
            bits[-1] |= 0xFF << n % 8 & 0xFF  # nothing is read of these
        values = ops.bits_select(x, bits, int(mask.sum()))
        assert_same(values, x[mask])
        assert_same(ops.bits_expand(values, bits, [n]), torch.where(mask, x, 0))


def test_threads_agree(isa):
    x = draw("few", torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            value, ties = ops.threshold_magnitude([x], [], 100_000)
            bits = ops.threshold_mask(x, None, value, ties)
            values = ops.bits_select(x, bits, 100_000)
            results.append((value, ties, bits, values, ops.bits_expand(values, bits, [MANY])))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_errors_say_what_was_wanted_and_what_came():
    pytest.importorskip("memtl._C")
    x, bits = torch.zeros(9), torch.zeros(2, dtype=torch.uint8)
    one = torch.ones((), dtype=torch.int64)
    for call, message in (
        (lambda: ops.threshold_magnitude([], [], 1), "one tensor or more, got none"),
        (lambda: ops.threshold_magnitude([x], [bits, bits], 1), "no masks, or 1 .*, got 2"),
        (lambda: ops.threshold_magnitude([x], [bits], 1), "k from 0 to 0, .*, got 1"),
        (lambda: ops.threshold_magnitude([x, x.double()], [], 1), "one dtype, got Float .*Double"),
        (lambda: ops.threshold_magnitude([x], [bits[:1]], 1), r"needs 2 bytes of bits, got Byte"),
        (lambda: ops.threshold_mask(x, None, x.double()[0], one), "in the dtype of x, got Double"),
        (lambda: ops.threshold_mask(x, None, x[0], x[0]), "ties of int64, got Float"),
        (lambda: ops.threshold_mask(x, bits[:1], x[0], one), "needs 2 bytes of bits"),
        (lambda: ops.bits_select(x, bits, 1), "1 values were asked for, and 0 bits are set"),
        (lambda: ops.bits_expand(x, bits, [9]), "9 values were asked for, and 0 bits are set"),
        (lambda: ops.bits_expand(x[None], bits, [9]), r"values \[count\], got Float \[1, 9\]"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()
