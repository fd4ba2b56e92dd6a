"""The threshold family, and selecting by bits, in Triton's interpreter; test_interpreter.py runs
this file."""

import math

import pytest
import torch

import memtl.functional as MF
from memtl import reference
from memtl.kernels import OPS
from tests.helpers import assert_same

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ops = torch.ops.memtl


def tensors(dtype):
    """With ties, and NaN and infinities among them."""
    generator = torch.Generator().manual_seed(5)
    xs = [
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in ((2051,), (0, 3), (), (50, 7))
    ]
    xs[0][::2] = (4 * xs[0][::2]).round() / 2
    for x in xs:
        x.view(-1)[::9], x.view(-1)[1::31], x.view(-1)[2::17] = math.nan, -math.nan, -math.inf
    return [x.to(dtype).T if x.dim() == 2 else x.to(dtype) for x in xs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds(dtype):
    xs = tensors(dtype)
    masks = [reference.bits_pack(torch.rand(x.shape) < 0.7) for x in xs]
    for k, given in ((100, masks), (700, masks), (1300, []), (2402, [])):
        value, ties = ops.threshold_magnitude(xs, given, k)
        expected = reference.threshold_magnitude(xs, given, k)
        assert_same(value, expected[0])
        assert_same(ties, expected[1])
        kept = 0
        for i, x in enumerate(xs):
            arguments = x, given[i] if given else None, value, ties[i]
            bits = ops.threshold_mask(*arguments)
            assert_same(bits, reference.threshold_mask(*arguments))
            kept += MF.count_bits(bits)
        assert kept == k


def test_none_are_asked_for():
    value, ties = ops.threshold_magnitude([torch.ones(3), torch.ones(2)], [], 0)
    assert value == math.inf and ties.tolist() == [0, 0]


def test_ties_run_out_within_a_tile_and_between_two():
    x, one = torch.ones(5000), torch.ones(())
    x[::3] = 0.5
    for count in (0, 1, 1365, 1366, 3000, 4000):
        ties = torch.tensor([count])
        assert_same(
            ops.threshold_mask(x, None, one, ties), reference.threshold_mask(x, None, one, ties)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(0,), (1,), (9,), (2048,), (5, 1001)], ids=str)
def test_select_and_expand(dtype, size):
    x = torch.randn(size).to(dtype)
    for density in (0.0, 0.3, 1.0):
        mask = torch.rand(size) < density
        bits = reference.bits_pack(mask)
        values = ops.bits_select(x, bits, int(mask.sum()))
        assert_same(values, x[mask])
        assert_same(ops.bits_expand(values, bits, list(size)), torch.where(mask, x, 0))


def test_strided_arguments():
    x, mask = torch.randn(41, 30), torch.rand(30, 41) < 0.5
    bits, count = reference.bits_pack(mask), int(mask.sum())
    values = ops.bits_select(x.T, bits.repeat_interleave(2)[::2], count)
    assert_same(values, x.T[mask])
    twice = values.repeat_interleave(2)[::2]
    assert_same(ops.bits_expand(twice, bits, [30, 41]), torch.where(mask, x.T, 0))


def test_arguments_of_another_size_or_type():
    x, bits, one = torch.ones(9), torch.zeros(1, dtype=torch.uint8), torch.tensor(1)
    away, two = x.to("meta"), torch.zeros(2, dtype=torch.uint8)
    for call, error, message in (
        (lambda: ops.bits_select(x, bits, 0), RuntimeError, "9 elements need 2 uint8 .* got 1"),
        (lambda: ops.bits_expand(x, bits, [9]), RuntimeError, "9 elements need 2 uint8 .* got 1"),
        (lambda: ops.bits_select(x.int(), bits, 0), TypeError, "got torch.int32"),
        (lambda: ops.threshold_mask(x, bits, x[0], one), RuntimeError, "need 2 uint8"),
        (lambda: ops.threshold_mask(x, None, x[0], x[0]), TypeError, "ties in torch.int64"),
        (lambda: ops.threshold_mask(x, None, x, one), RuntimeError, "one value"),
        (lambda: ops.threshold_magnitude([x], [bits], 1), RuntimeError, "need 2 uint8"),
        (lambda: ops.threshold_magnitude([x], [bits, bits], 1), RuntimeError, "no masks, or 1"),
        (lambda: ops.threshold_magnitude([x, x.half()], [], 1), TypeError, "one dtype"),
        (lambda: ops.threshold_magnitude([x], [], 10), ValueError, "from 0 to 9"),
        (lambda: ops.bits_expand(x[None], two, [9]), RuntimeError, "expected values .count."),
        (lambda: OPS["bits_select"](away, two, 0), ValueError, "x on meta, bits on cpu"),
        (lambda: OPS["bits_expand"](away, two, [9]), ValueError, "values on meta, bits on cpu"),
        (lambda: OPS["bits_apply"](away, two, 1.0), ValueError, "x on meta, bits on cpu"),
        (lambda: OPS["threshold_mask"](x, None, away[0], one), ValueError, "value on meta"),
        (lambda: OPS["threshold_magnitude"]([x, away], [], 1), ValueError, r"xs\[1\] on meta"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_opcheck():
    x, mask = torch.randn(3, 13), torch.rand(3, 13) < 0.5
    bits, count = ops.bits_pack(mask), int(mask.sum())
    torch.library.opcheck(ops.bits_select, (x, bits, count))
    torch.library.opcheck(ops.bits_expand, (x[mask], bits, [3, 13]))
    torch.library.opcheck(ops.threshold_magnitude, ([x, x.T], [bits, bits], 2 * count))
    torch.library.opcheck(ops.threshold_mask, (x, bits, x[1, 1], torch.tensor(1)))
