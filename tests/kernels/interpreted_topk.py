"""The topk family in Triton's interpreter; test_interpreter.py runs this file.

The interpreter truncates float32 to bfloat16 where a GPU rounds to the nearest (see test_aot.py and
tests/gpu), so that where bfloat16 is written here, x is of such numbers.
"""

import importlib
import itertools
import math

import pytest
import torch

import memtl
import memtl.functional as MF
from memtl import kernels, reference
from memtl.storage import TopK
from tests.helpers import assert_same, assert_within, gamma, unit

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
VALUES = (torch.int8, torch.float32, torch.float16, torch.bfloat16)
KINDS = ("normal", "ties", "not finite", "few", "apart", "tiny")
NO_COUNTS = torch.empty(0, dtype=torch.int16)
NO_SCALE = torch.empty(0, dtype=torch.bfloat16)
ops = torch.ops.memtl
topk = importlib.import_module("memtl.kernels.topk")
topk_grad = importlib.import_module("memtl.kernels.topk_grad")


def draw(rows, n, dtype=torch.float32, kind="normal", seed=0):
    """Numbers of bfloat16, of one kind or another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    chosen = torch.rand(rows, n, generator=generator)
    if kind == "ties":  # of both signs, and zeros
        x = (2 * x).round() / 4
    elif kind == "not finite":
        x[chosen < 0.3], x[chosen < 0.2], x[chosen < 0.1] = math.inf, -math.inf, math.nan
    elif kind == "few":  # a block of zeros but for some
        x[chosen < 0.95] = -0.0
    elif kind == "apart":  # from the largest, more than is searched first
        x *= 2.0 ** (-14 * chosen)
    elif kind == "tiny":  # subnormal numbers
        x *= torch.finfo(torch.float16 if dtype == torch.float16 else torch.float32).tiny / 4
    return x.float().bfloat16().to(dtype)


def check(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous()
        assert_same(a, e)


def test_triton_serves():
    family = [op for op in memtl._ops.NAMES if op.startswith("topk_")]
    assert len(family) == 5 and set(family) <= set(kernels.OPS)
    assert {memtl.backends.owner(op, "cpu") for op in family} == {"triton"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack(dtype):
    kinds = KINDS[:5] if dtype == torch.bfloat16 else KINDS  # tiny ones the interpreter misreads
    x = torch.cat([draw(1, 300, dtype, kind, seed) for seed, kind in enumerate(kinds)])
    for values, k, k_tail in ((torch.int8, 26, 4), (torch.float16, 0, 44), (torch.float32, 256, 1)):
        for bitmap in (False, True):
            check(
                ops.topk_pack(x, k, k_tail, values, bitmap),
                reference.topk_pack(x, k, k_tail, values, bitmap),
            )


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 255, 257, 512])
def test_sizes(n, values):
    x, k_tail = 1e3 * draw(3, n), (n % 256 + 5) // 6
    if values == torch.bfloat16:
        x = draw(3, n)
    for bitmap in (False, True):
        packed = ops.topk_pack(x, 40, k_tail, values, bitmap)
        check(packed, reference.topk_pack(x, 40, k_tail, values, bitmap))
        arguments = (*packed, NO_COUNTS, n, 40, k_tail, bitmap, torch.float64)
        check([ops.topk_unpack(*arguments)], [reference.topk_unpack(*arguments)])


def test_int8_codes_are_rounded_as_defined():
    """Halves of a step go to the even code; the step is rounded up, at least 2**-126."""
    x = torch.arange(-126, 127).float().repeat(3, 1)[:, :252] / 2
    x[0, 0], x[1, 0], x[2] = 126.0, 126.0 + 2**-16, 2.0**-130 * x[2]
    check(
        ops.topk_pack(x, 0, 252, torch.int8, False),
        reference.topk_pack(x, 0, 252, torch.int8, False),
    )


def test_a_nan_is_ranked_by_its_bits():
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F800000, 0x7FC00000, -0x3FFFFF])
    x = bits.to(torch.int32).view(torch.float32).view(1, 6)
    for k in range(7):
        check(
            ops.topk_pack(x, 0, k, torch.int8, True), reference.topk_pack(x, 0, k, torch.int8, True)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype):
    x = torch.cat([draw(1, 300, dtype, kind, seed) for seed, kind in enumerate(KINDS[:4])])
    own = torch.float32 if dtype == torch.float64 else dtype
    for k, values, bitmap in ((0, torch.int8, False), (70, torch.int8, True), (299, own, False)):
        packed = ops.topk_pack_sample(x, k, values, bitmap)
        check(packed, reference.topk_pack_sample(x, k, values, bitmap))
        arguments = (*packed, 300, k, 0, bitmap, torch.float32)
        check([ops.topk_unpack(*arguments)], [reference.topk_unpack(*arguments)])


def test_a_sample_of_several_programs(monkeypatch):
    """Counted in three parts, of two tiles each; ties run out within a block and between two."""
    monkeypatch.setattr(topk, "TILE", 256)
    monkeypatch.setattr(topk, "TILES", 2)
    x = draw(3, 1500, torch.bfloat16, "ties")
    x[0] = 1.0
    for k in (1, 100, 256, 1500):
        check(
            ops.topk_pack_sample(x, k, torch.float16, False),
            reference.topk_pack_sample(x, k, torch.float16, False),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_unpack_gives_what_is_not_finite(dtype):
    x = draw(2, 300, kind="not finite")
    for values, bitmap in itertools.product(VALUES, (False, True)):
        packed = reference.topk_pack(x, 200, 20, values, bitmap)
        arguments = (*packed, NO_COUNTS, 300, 200, 20, bitmap, dtype)
        check([ops.topk_unpack(*arguments)], [reference.topk_unpack(*arguments)])


def test_a_row_is_read_within_its_bounds():
    """Whatever counts, positions and bits say."""
    around = torch.full((3, 100), math.nan)
    around[1] = 1.0
    values = around[1:2]
    dense = {"n": 600, "k": 100, "k_tail": 0, "dtype": torch.float32}
    for counts in ([300, -300, 100], [-1, 101, 0], [50, 200, -400], [-9999, 9999, 256]):
        counts = torch.tensor([counts], dtype=torch.int16)
        for bitmap in (False, True):
            positions = torch.full((1, 75 if bitmap else 100), 255, dtype=torch.uint8)
            x = ops.topk_unpack(values, positions, NO_SCALE, counts, bitmap=bitmap, **dense)
            assert x.shape == (1, 600) and ((x == 0) | (x == 1)).all()
    counts = torch.tensor([[40, 50, 10]], dtype=torch.int16)
    every = torch.full((1, 75), 255, dtype=torch.uint8)
    x = ops.topk_unpack(values, every, NO_SCALE, counts, bitmap=True, **dense)
    assert x.count_nonzero() == 100


def test_strided_arguments():
    x = draw(600, 5).T
    for sample in (False, True):
        if sample:
            *packed, counts = ops.topk_pack_sample(x, 61, torch.int8, False)
            expected = (*reference.topk_pack_sample(x, 61, torch.int8, False),)
            check([*packed, counts], expected)
            quota = (61, 0)
        else:
            packed, counts, quota = ops.topk_pack(x, 26, 9, torch.int8, False), NO_COUNTS, (26, 9)
            check(packed, reference.topk_pack(x, 26, 9, torch.int8, False))
        apart = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in (*packed, counts)]
        arguments = (600, *quota, False, torch.float32)
        check(
            [ops.topk_unpack(*apart, *arguments)],
            [reference.topk_unpack(*packed, counts, *arguments)],
        )


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("sample", [False, True])
def test_empty(sample, values):
    for (rows, n), bitmap in itertools.product([(0, 300), (3, 0), (0, 0)], (False, True)):
        x = torch.randn(rows, n)
        if sample:
            packed, k, k_tail = ops.topk_pack_sample(x, n // 2, values, bitmap), n // 2, 0
            check(packed, reference.topk_pack_sample(x, k, values, bitmap))
        else:
            packed, k, k_tail = (*ops.topk_pack(x, 26, 4, values, bitmap), NO_COUNTS), 26, 4
            check(packed[:3], reference.topk_pack(x, k, k_tail, values, bitmap))
        dense = ops.topk_unpack(*packed, n, k, k_tail, bitmap, torch.float16)
        assert_same(dense, x.half())
        grad = ops.topk_weight_grad(*packed, torch.randn(rows, 4), n, n, k, k_tail, bitmap)
        assert_same(grad, torch.zeros(4, n))


# --------------------------------------------------------------------------------- weight gradients


def rounding(dtype, values):
    """Of x, relative: in 16 bits it is read in grad_out's dtype."""
    return 0.0 if dtype.itemsize > 2 or values == dtype else unit(dtype)


@pytest.mark.parametrize("values", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_grad(dtype, values, monkeypatch):
    """In several pieces: rows of blocks, and samples of which a token is no whole part."""
    monkeypatch.setattr(topk_grad, "DENSE_BYTES", 3000)
    if dtype == torch.bfloat16 and values != dtype:
        values = dtype  # of what else is decoded the interpreter truncates
    x = draw(9, 300)
    blocks = (*reference.topk_pack(x, 26, 4, values, False), NO_COUNTS)
    samples = reference.topk_pack_sample(x, 90, values, True)
    for packed, features, k, k_tail, bitmap in (
        (blocks, 300, 26, 4, False),
        (samples, 20, 90, 0, True),
        (samples, 900, 90, 0, True),
    ):
        x = reference.topk_unpack(*packed, 300, k, k_tail, bitmap, torch.float64)
        x = x.view(-1, features)
        grad_out = draw(len(x), 7, seed=1).T.contiguous().T.to(dtype)
        actual = ops.topk_weight_grad(*packed, grad_out, 300, features, k, k_tail, bitmap)
        assert actual.dtype == torch.float32
        exact, size = grad_out.double().T @ x, grad_out.double().T.abs() @ x.abs()
        assert_within(actual, exact, (gamma(len(x) + 3) + rounding(dtype, values)) * size)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_weight_grad(dtype, channels_last, monkeypatch):
    monkeypatch.setattr(topk_grad, "DENSE_BYTES", 3000)
    values = torch.int8 if dtype != torch.bfloat16 else dtype
    packed = (*reference.topk_pack(draw(5, 4 * 9 * 8), 51, 6, values, False), NO_COUNTS)
    options = ([4, 9, 8], [3, 2], [2, 1], [1, 0], [1, 2], channels_last, 51, 6, False)
    grad_out = draw(5, 3 * 5 * 6, seed=1).view(5, 3, 5, 6).to(dtype)
    actual = ops.topk_conv_weight_grad(*packed, grad_out, *options)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    expected = reference.topk_conv_weight_grad(*packed, grad_out.float(), *options)
    magnitudes = (packed[0].abs(), *packed[1:], grad_out.float().abs())
    size = reference.topk_conv_weight_grad(*magnitudes, *options)
    bound = 2 * gamma(5 * 30 + 2)
    if dtype.itemsize == 2:  # x as above, and the sums of each piece
        bound += 2 * unit(dtype)
    assert_within(actual, expected, bound * size)
    assert actual.abs().max() > 0.1


def test_no_samples_and_no_outputs():
    packed = (*ops.topk_pack(torch.randn(0, 24), 0, 3, torch.int8, False), NO_COUNTS)
    options = ([3, 8], [3], [1], [1], [1], False, 0, 3, False)
    grad = ops.topk_conv_weight_grad(*packed, torch.randn(0, 5, 8), *options)
    assert_same(grad, torch.zeros(5, 3, 3))
    packed = (*ops.topk_pack(torch.randn(2, 24), 0, 3, torch.int8, False), NO_COUNTS)
    grad = ops.topk_conv_weight_grad(*packed, torch.randn(2, 0, 8), *options)
    assert_same(grad, torch.zeros(0, 3, 3))
    grad = ops.topk_weight_grad(*packed, torch.randn(2, 0), 24, 24, 0, 3, False)
    assert_same(grad, torch.zeros(0, 24))


def test_the_gradient_of_a_linear_layer():
    x, weight = torch.randn(2, 3, 90), torch.randn(11, 90, requires_grad=True)
    for form in (TopK(0.1), TopK(0.3, values="fp32"), TopK(0.1, scope="sample")):
        grad_out = torch.randn(2, 3, 11)
        (actual,) = torch.autograd.grad(MF.linear(x, weight, format=form), weight, grad_out)
        kept = form.unpack(form.pack(x), x.shape, x.dtype)
        expected = grad_out.flatten(0, 1).T @ kept.flatten(0, 1)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- arguments


def test_arguments_of_another_size_or_type():
    x, none = torch.randn(2, 300), NO_COUNTS
    values, positions, scale = ops.topk_pack(x, 26, 4, torch.int8, False)
    grad = torch.randn(2, 5)
    conv = ([3, 100], [3], [1], [1], [1], False, 26, 4, False)
    quota = (300, 26, 4, False)
    for call, error, message in (
        (lambda: ops.topk_pack(x.int(), 26, 4, torch.int8, False), TypeError, "got torch.int32"),
        (lambda: ops.topk_pack(x, 26, 4, torch.int32, False), TypeError, "values in .*int32"),
        (lambda: ops.topk_pack(x[0], 26, 4, torch.int8, False), RuntimeError, r"\[R, n\]"),
        (lambda: ops.topk_pack(x, 257, 4, torch.int8, False), ValueError, r"k in \[0, 256\]"),
        (lambda: ops.topk_pack(x, 26, 45, torch.int8, False), ValueError, r"k_tail in \[0, 44\]"),
        (lambda: ops.topk_pack_sample(x, 301, torch.int8, False), ValueError, r"\[0, 300\]"),
        (lambda: ops.topk_pack_sample(x.int(), 1, torch.int8, False), TypeError, "torch.int32"),
        (
            lambda: ops.topk_unpack(values, positions, none, none, *quota, x.dtype),
            RuntimeError,
            "expected scale",
        ),
        (
            lambda: ops.topk_unpack(values, positions[:1], scale, none, *quota, x.dtype),
            RuntimeError,
            "expected positions",
        ),
        (
            lambda: ops.topk_unpack(values, positions, scale, none, 300, 26, 5, False, x.dtype),
            RuntimeError,
            r"expected values \[2, 31\]",
        ),
        (
            lambda: ops.topk_unpack(values, positions, scale, none, *quota, torch.int8),
            TypeError,
            "got torch.int8",
        ),
        (
            lambda: ops.topk_unpack(values.int(), positions, scale, none, *quota, x.dtype),
            TypeError,
            "values in .*int32",
        ),
        (
            lambda: ops.topk_weight_grad(
                values, positions, scale, none, grad[:1], 300, 300, 26, 4, False
            ),
            RuntimeError,
            "2 rows of 300 are not 1 tokens of 300",
        ),
        (
            lambda: ops.topk_conv_weight_grad(values, positions, scale, none, grad, *conv),
            RuntimeError,
            r"expected grad_out \[2, O, 100\]",
        ),
        (
            lambda: ops.topk_conv_weight_grad(
                values, positions, scale, none, grad, conv[0], [3, 3], *conv[2:]
            ),
            RuntimeError,
            "1 spatial dimensions and",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_opcheck():
    x, grad = torch.randn(2, 300), torch.randn(2, 5)
    blocks = (*ops.topk_pack(x, 26, 4, torch.int8, True), NO_COUNTS)
    samples = ops.topk_pack_sample(x, 30, torch.float16, False)
    conv = ([3, 100], [3], [1], [1], [1], False, 26, 4, True)
    for op, arguments in (
        (ops.topk_pack, (x, 26, 4, torch.int8, True)),
        (ops.topk_pack_sample, (x, 30, torch.float16, False)),
        (ops.topk_unpack, (*samples, 300, 30, 0, False, torch.float64)),
        (ops.topk_weight_grad, (*blocks, grad, 300, 300, 26, 4, True)),
        (ops.topk_conv_weight_grad, (*blocks, torch.randn(2, 5, 100), *conv)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
