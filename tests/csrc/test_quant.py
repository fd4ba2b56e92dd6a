"""quant_pack, quant_unpack and their range forms in C++ against the reference, bit for bit."""

import itertools
import math

import pytest
import torch

import memtl  # noqa: F401  (defines and registers the operators)
from memtl import reference

SIZES = [0, 1, 7, 63, 64, 65, 1000, 4097]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = [8, 4, 3, 2]
LO, HI = -0.17, 1.13
KINDS = ["normal", "relu", "constant", "offset", "zeros", "tiny", "huge", "wide", "broken"]
ops = torch.ops.memtl


def data(kind, n, dtype=torch.float32):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    if kind == "relu":
        x = x.relu()
    elif kind == "constant":
        x = torch.full_like(x, -0.7)
    elif kind == "offset":
        x = x * 1e-3 + 1000
    elif kind == "zeros":
        x = torch.zeros_like(x)
        x[::3] = -0.0
    elif kind == "tiny":
        x = x * 1e-41
    elif kind == "huge":
        x = x * 1e38
    elif kind == "wide":
        x = x * 10.0 ** (torch.arange(n, dtype=torch.float64) % 70 - 35)
    x = x.to(dtype)
    if kind == "broken":  # after the conversion, which may give NaN any bits
        x[::97] = math.nan
        x[5::301] = math.inf
        x[9::211] = -math.inf
    return x


def as_packed(x):
    """x in float32, as the operators see it, every NaN the same: torch's own conversion of a
    float16 NaN gives other bits in its vector loop than in the loop for the rest."""
    return torch.where(x.isnan(), math.nan, x.float())


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack(isa, dtype, kind):
    for n, bits in itertools.product(SIZES, BITS):
        x = data(kind, n, dtype)
        for seed in (0, 123456789012345, -7):
            codes, params = ops.quant_pack(x, bits, seed)
            wanted_codes, wanted_params = reference.quant_pack(as_packed(x), bits, seed)
            assert_identical(codes, wanted_codes)
            assert_identical(params, wanted_params)
        wanted = reference.quant_pack_range(as_packed(x), bits, LO, HI, 5)
        assert_identical(ops.quant_pack_range(x, bits, LO, HI, 5), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_unpack(isa, dtype, kind):
    for n, bits in itertools.product(SIZES, BITS):
        codes, params = reference.quant_pack(data(kind, n), bits, 3)
        actual = ops.quant_unpack(codes, params, bits, [n], dtype)
        assert_identical(actual, reference.quant_unpack(codes, params, bits, [n], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_unpack_range_of_every_code(isa, bits, dtype):
    codes = torch.arange(64 * bits * 33).remainder(256).to(torch.uint8).view(-1, 8 * bits)
    n = codes.shape[0] * 64 - 5
    actual = ops.quant_unpack_range(codes, bits, LO, HI, [n], dtype)
    assert_identical(actual, reference.quant_unpack_range(codes, bits, LO, HI, [n], dtype))
    assert actual.isnan().any()


def test_any_shape_and_stride(isa):
    x = data("normal", 4 * 6 * 10).view(4, 6, 10)
    for view in (x.transpose(0, 2), x[:, ::2], x[1:, :, 3:], x[:, :, :0], x.permute(1, 2, 0)[None]):
        codes, params = ops.quant_pack(view, 4, 1)
        wanted = reference.quant_pack(view, 4, 1)
        assert_identical(codes, wanted[0])
        assert_identical(params, wanted[1])
        size = list(view.shape)
        assert_identical(
            ops.quant_unpack(codes, params, 4, size, torch.float32),
            reference.quant_unpack(*wanted, 4, size, torch.float32),
        )
        ranged = reference.quant_pack_range(view, 4, LO, HI, 1)
        assert_identical(ops.quant_pack_range(view, 4, LO, HI, 1), ranged)


def test_strided_codes_and_params(isa):
    codes, params = reference.quant_pack(data("normal", 640), 4, 1)
    wanted = reference.quant_unpack(codes, params, 4, [640], torch.float32)
    strided = codes.t().contiguous().t(), params.t().contiguous().t()
    assert not strided[0].is_contiguous()
    assert_identical(ops.quant_unpack(*strided, 4, [640], torch.float32), wanted)


def test_a_scalar(isa):
    packed = ops.quant_pack(torch.tensor(2.0), 8, 1)
    assert ops.quant_unpack(*packed, 8, [], torch.float32) == torch.tensor(2.0)


def test_threads_agree(isa):
    x = data("normal", 300_001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            codes, params = ops.quant_pack(x, 4, 9)
            out = ops.quant_unpack(codes, params, 4, [300_001], torch.float32)
            results.append((codes, params, out))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_errors_name_the_tensor():
    pytest.importorskip("memtl._C")
    x = torch.randn(100)
    codes, params = ops.quant_pack(x, 4, 0)
    with pytest.raises(RuntimeError, match="quant_pack: expected bits 8, 4, 3 or 2, got 5"):
        ops.quant_pack(x, 5, 0)
    with pytest.raises(RuntimeError, match=r"quant_pack: expected x in float32, .*, got Long"):
        ops.quant_pack(x.long(), 4, 0)
    with pytest.raises(RuntimeError, match=r"elements in 4 bits need codes \[3, 32\], got Byte"):
        ops.quant_unpack(codes, params, 4, [129], torch.float32)
    with pytest.raises(RuntimeError, match=r"expected params of bfloat16 \[2, 2\], got Float"):
        ops.quant_unpack(codes, params.float(), 4, [100], torch.float32)
    with pytest.raises(RuntimeError, match=r"expected a result in float32, .*, got Int"):
        ops.quant_unpack(codes, params, 4, [100], torch.int32)
    with pytest.raises(RuntimeError, match="quant_pack_range: expected lo < hi, got 1 and 1"):
        ops.quant_pack_range(x, 4, 1.0, 1.0, 0)
