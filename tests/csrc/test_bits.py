"""The bits family in C++ against the reference, for every instruction set."""

import math

import pytest
import torch

import memtl  # noqa: F401  (defines and registers the operators)
from memtl import reference

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 1000, 4097, 70001]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ops = torch.ops.memtl


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def data(n, dtype=torch.float32, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[3::17] = math.nan
    x[4::19] = math.inf
    x[5::23] = -math.inf
    x[6::29] = -0.0
    x[2::31] *= 1e-42
    return x.to(dtype)


def mask_of(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize("n", SIZES)
def test_pack(isa, n):
    mask = mask_of(n)
    assert torch.equal(ops.bits_pack(mask), reference.bits_pack(mask))


@pytest.mark.parametrize("fill", [False, True])
def test_pack_of_one_value(isa, fill):
    mask = torch.full((777,), fill)
    assert torch.equal(ops.bits_pack(mask), reference.bits_pack(mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_apply(isa, n, dtype):
    x = data(n, dtype)
    bits = reference.bits_pack(mask_of(n))
    for scale in (1.0, 1 / 0.9, -0.3, 1e-3):
        assert_identical(ops.bits_apply(x, bits, scale), reference.bits_apply(x, bits, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_pack_between(isa, n, dtype):
    x = data(n, dtype)
    x[1::7] = 0.1
    for lo, hi in ((0.0, None), (0.0, 6.0), (None, 0.1), (-0.3, 0.1), (0.1, None), (None, None)):
        bits = ops.bits_pack_between(x, lo, hi)
        assert torch.equal(bits, reference.bits_pack_between(x, lo, hi)), (lo, hi)
    assert torch.equal(ops.bits_pack_between(x, 0.0, None), reference.bits_pack(~(x <= 0)))


def test_any_shape_and_stride(isa):
    x = data(4 * 6 * 10).view(4, 6, 10)
    for view in (x.transpose(0, 2), x[:, ::2], x[1:, :, 3:], x[:, :, :0], x.permute(1, 2, 0)[None]):
        mask = view > 0
        bits = ops.bits_pack(mask)
        assert torch.equal(bits, reference.bits_pack(mask))
        assert torch.equal(
            ops.bits_pack_between(view, 0.0, None), reference.bits_pack(~(view <= 0))
        )
        out = ops.bits_apply(view, bits, 1.25)
        assert out.shape == view.shape and out.is_contiguous()
        assert_identical(out, reference.bits_apply(view, bits, 1.25))


def test_strided_bits(isa):
    x = data(64)
    bits = torch.arange(16, dtype=torch.uint8)[::2]
    assert_identical(ops.bits_apply(x, bits, 2.0), reference.bits_apply(x, bits, 2.0))


def test_a_scalar(isa):
    bits = torch.tensor([1], dtype=torch.uint8)
    assert ops.bits_apply(torch.tensor(3.0), bits, 0.5).shape == ()
    assert ops.bits_pack(torch.tensor(True)).tolist() == [1]


def test_threads_agree(isa):
    x, mask = data(300_001), mask_of(300_001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            bits = ops.bits_pack(mask)
            results.append((bits, ops.bits_apply(x, bits, 1.1)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert_identical(results[0][1], results[1][1])


def test_errors_name_the_tensor():
    pytest.importorskip("memtl._C")
    x, bits = torch.zeros(9), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"bits_pack: expected mask of bool, got Float \[9\]"):
        ops.bits_pack(x)
    with pytest.raises(RuntimeError, match=r"bits_apply: x Float \[9\] needs 2 bytes of bits, got"):
        ops.bits_apply(x, bits[:1], 1.0)
    with pytest.raises(RuntimeError, match=r"bits_apply: expected bits of uint8, got Char \[2\]"):
        ops.bits_apply(x, bits.to(torch.int8), 1.0)
    with pytest.raises(RuntimeError, match=r"bits_apply: expected x in float32, .*, got Int"):
        ops.bits_apply(x.int(), bits, 1.0)


@pytest.mark.gpu
def test_apply_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for dtype in DTYPES:
        for n in SIZES:
            x, bits = data(n, dtype), reference.bits_pack(mask_of(n))
            out = ops.bits_apply(x.cuda(), bits.cuda(), 1 / 0.9)
            assert_identical(out.cpu(), reference.bits_apply(x, bits, 1 / 0.9))
