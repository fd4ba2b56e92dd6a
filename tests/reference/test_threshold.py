"""The k largest magnitudes of many tensors, against a sort in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

import memtl.functional as MF
from memtl import reference
from tests.helpers import assert_same

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((300,), (0, 4), (7, 9), (), (3, 1, 50), (1,))
NUMEL = sum(math.prod(s) for s in SHAPES)


def tensors(dtype, kind="normal"):
    """``ties``: a dozen magnitudes; ``broken``: with NaN of several kinds and infinities."""
    xs = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
    if kind == "ties":
        xs = [(x * 3).round() / 4 for x in xs]
    xs = [x.to(dtype) for x in xs]
    if kind == "broken":
        for x in xs:
            flat = x.view(-1)
            for start, value in enumerate((math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0)):
                flat[start :: 31 + start] = value
    return xs


def rank(x: float) -> float:
    """NaN beyond infinity."""
    return math.nextafter(math.inf, 0) if math.isinf(x) else math.inf if math.isnan(x) else abs(x)


def survivors(xs, masks, k):
    """(tensor, element) of the k largest: by magnitude, then in order."""
    places = [
        (-rank(value), i, j)
        for i, x in enumerate(xs)
        for j, value in enumerate(x.double().flatten().tolist())
        if masks is None or masks[i][j]
    ]
    return sorted(places)[:k]


def flags(bits, numel):
    return reference.bits.bits_unpack(bits, numel)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("kind", ["normal", "ties", "broken"])
@pytest.mark.parametrize("masked", [False, True])
def test_just_the_k_largest_survive(ops, dtype, kind, masked):
    xs = tensors(dtype, kind)
    masks = [torch.rand(x.numel()) < 0.6 for x in xs] if masked else None
    packed = [reference.bits_pack(m) for m in masks] if masked else []
    most = sum(int(m.sum()) for m in masks) if masked else NUMEL
    for k in (1, 2, 5, 17, 60, most // 2, most - 1, most):
        value, ties = ops.threshold_magnitude(xs, packed, k)
        assert value.dtype == dtype and value.shape == ()
        assert ties.dtype == torch.int64 and ties.shape == (len(xs),)
        expected = survivors(xs, masks, k)
        last = -expected[-1][0]
        assert rank(value.item()) == last
        tied = [sum(-r == last and i == t for r, i, _ in expected) for t in range(len(xs))]
        assert ties.tolist() == tied
        for i, x in enumerate(xs):
            bits = ops.threshold_mask(x, packed[i] if masked else None, value, ties[i])
            kept = flags(bits, x.numel()).nonzero().flatten().tolist()
            assert kept == sorted(j for _, t, j in expected if t == i)


def test_every_number_of_ties(ops):
    xs = [torch.tensor([2.0, -1.0, 1.0]), torch.tensor([]), torch.tensor([[1.0, -3.0], [-1.0, 0]])]
    for k, wanted in enumerate(
        ([0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0], [2, 0, 0], [2, 0, 1], [2, 0, 2], [0, 0, 1])
    ):
        value, ties = ops.threshold_magnitude(xs, [], k)
        assert ties.tolist() == wanted
        assert value == [math.inf, 3, 2, 1, 1, 1, 1, 0][k]


def test_float64_is_told_apart_to_the_last_bit(ops):
    steps = torch.arange(-500, 500, dtype=torch.int64)[torch.randperm(1000)]
    one = torch.ones(1, dtype=torch.float64).view(torch.int64)
    x = (one + steps).view(torch.float64)
    for k in (1, 77, 500, 501, 1000):
        value, ties = ops.threshold_magnitude([x], [], k)
        assert value == x.sort(descending=True).values[k - 1]
        assert ties.tolist() == [1]
        assert flags(ops.threshold_mask(x, None, value, ties), 1000).sum() == k


def test_the_order_of_ties_is_by_rows_however_a_tensor_lies(ops):
    x = (torch.randn(30, 41) * 2).round()
    for view in (x.T, x[::2, 3:], x[:, None].expand(30, 2, 41)):
        whole = view.contiguous()
        got, wanted = (ops.threshold_magnitude([v, x], [], 300) for v in (view, whole))
        assert_same(got[0], wanted[0])
        assert_same(got[1], wanted[1])
        bits = ops.threshold_mask(view, None, *wanted[:1], wanted[1][0])
        assert_same(bits, ops.threshold_mask(whole, None, *wanted[:1], wanted[1][:1]))


def test_nothing_but_padding_is_read_behind_the_last_element(ops):
    """Bits beyond the elements, which a mask from elsewhere may have, change nothing."""
    x, ones = torch.randn(13), torch.full((2,), 255, dtype=torch.uint8)
    value, ties = ops.threshold_magnitude([x], [ones], 13)
    assert value == x.abs().min()
    assert ops.threshold_mask(x, ones, value, ties).tolist() == [255, 31]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
def test_selecting_and_expanding_are_inverse(ops, dtype, density):
    for shape in ((0,), (1,), (7,), (64,), (65,), (5, 13), (1000,), (3, 700)):
        mask = torch.rand(shape) < density
        x, bits, count = torch.randn(shape).to(dtype), ops.bits_pack(mask), int(mask.sum())
        values = ops.bits_select(x, bits, count)
        assert_same(values, x[mask])
        assert_same(ops.bits_expand(values, bits, list(shape)), torch.where(mask, x, 0))
        if x.dim() == 2:
            assert_same(ops.bits_select(x.T, ops.bits_pack(mask.T), count), x.T[mask.T])


def test_a_wrong_count_names_both(ops):
    x, bits = torch.randn(16), torch.tensor([7, 1], dtype=torch.uint8)
    for wrong in (3, 5):
        with pytest.raises((ValueError, RuntimeError), match=rf"{wrong} values .* 4 bits are set"):
            ops.bits_select(x, bits, wrong)
        with pytest.raises((ValueError, RuntimeError), match=rf"{wrong} values .* 4 bits are set"):
            ops.bits_expand(x[:wrong], bits, [16])


# ------------------------------------------------------------------------------- public functions


@pytest.mark.parametrize("kind", ["normal", "ties", "broken"])
def test_masks_hold_exactly_k_and_lie_in_those_given(kind):
    xs = [torch.nn.Parameter(x) for x in tensors(torch.bfloat16, kind)]
    outer = MF.magnitude_masks(xs, 200)
    for k in (0, 1, 50, 200):
        masks = MF.magnitude_masks(xs, k, outer)
        assert sum(map(MF.count_bits, masks)) == k
        assert all(torch.equal(m & o, m) for m, o in zip(masks, outer, strict=True))
        value, ties = MF.magnitude_threshold(xs, k, outer)
        assert not value.requires_grad and ties.sum() <= k
    again = MF.magnitude_masks(xs, 200, outer)
    assert all(map(torch.equal, again, outer))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3), 1), TypeError, "sequence of tensors, got Tensor"),
        (([torch.ones(3), 2.0], 1), TypeError, r"tensors\[1\] must be a tensor, got float"),
        (([torch.ones(3).long()], 1), TypeError, "floating-point dtype, got torch.int64"),
        (([torch.ones(3), torch.ones(3).half()], 1), TypeError, "one dtype, got .*float16"),
        (([], 0), ValueError, "one tensor or more, got none"),
        (([torch.ones(3)], 1.0), TypeError, "k must be an int, got float"),
        (([torch.ones(3)], True), TypeError, "k must be an int, got bool"),
        (([torch.ones(3)], 4), ValueError, "from 0 to 3, .* got 4"),
        (([torch.ones(3)], -1), ValueError, "from 0 to 3, .* got -1"),
        (([torch.ones(3)], 3, [torch.tensor([5]).byte()]), ValueError, "from 0 to 2, .* got 3"),
        (
            ([torch.ones(3)], 1, [torch.tensor([5])]),
            TypeError,
            r"masks\[0\] .*uint8, got torch",
        ),
        (([torch.ones(9)], 1, [torch.ones(1).byte()]), ValueError, r"\[2\] on cpu .* got \[1\]"),
        (([torch.ones(9)] * 2, 1, [torch.ones(2).byte()]), ValueError, "each of 2 tensors, got 1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    for function in (MF.magnitude_threshold, MF.magnitude_masks):
        with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
            function(*arguments)


def test_count_bits():
    bits = torch.arange(256, dtype=torch.uint8)
    assert MF.count_bits(bits) == 1024
    assert MF.count_bits(bits[:0]) == 0
    with pytest.raises(TypeError, match="must be a tensor of uint8, got torch.bool"):
        MF.count_bits(bits > 3)
