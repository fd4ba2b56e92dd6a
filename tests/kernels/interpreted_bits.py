"""Packing bits and applying them in Triton's interpreter; test_interpreter.py runs this file."""

import pytest
import torch
import torch.nn.functional as F

import memtl
from memtl import kernels, reference

SIZES = (0, 1, 7, 8, 9, 255, 256, 257, 1000, 4099)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
pack, apply = torch.ops.memtl.bits_pack, torch.ops.memtl.bits_apply
between = torch.ops.memtl.bits_pack_between


def masked(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    return x, torch.rand(size, generator=generator) < 0.5


def scales(dtype):
    # Triton's interpreter truncates float32 to bfloat16, where a GPU rounds to the nearest (see
    # test_aot.py and tests/gpu): only products that need no rounding can be compared here.
    return (1.0, -0.5, 0.0) if dtype == torch.bfloat16 else (1.0, 1 / 0.9, -1e-3, 0.0)


def assert_identical(actual, expected):
    """Equal in shape, dtype and value, -0 apart from 0, NaN equal to NaN; and contiguous."""
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit(), expected.signbit())


def test_triton_serves():
    assert {memtl.backends.owner(op, "cpu") for op in kernels.OPS} == {"triton"}


@pytest.mark.parametrize("size", SIZES)
def test_pack(size):
    _, mask = masked(size)
    assert_identical(pack(mask), reference.bits_pack(mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_pack_between(size, dtype):
    x = masked(size)[0].to(dtype)
    x[::5], x[1::7], x[2::11], x[3::13] = 0.1, -torch.inf, torch.nan, -0.0
    for lo, hi in ((0.0, None), (None, 0.1), (-0.3, 0.1), (0.1, 1e6), (None, None)):
        assert_identical(between(x, lo, hi), reference.bits_pack_between(x, lo, hi))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_apply(size, dtype):
    x, mask = masked(size)
    bits = reference.bits_pack(mask)
    for scale in scales(dtype):
        expected = reference.bits_apply(x.to(dtype), bits, scale)
        assert_identical(apply(x.to(dtype), bits, scale), expected)


def test_the_padding_of_the_last_byte_is_zero():
    assert pack(torch.ones(9, dtype=torch.bool)).tolist() == [255, 1]


@pytest.mark.parametrize("shape", [(), (5, 7), (3, 1, 11), (0, 4)], ids=str)
def test_shapes(shape):
    x, mask = masked(shape)
    assert_identical(pack(mask), reference.bits_pack(mask))
    assert_identical(apply(x, pack(mask), 2.0), torch.where(mask, 2.0 * x, 0.0))


def test_strided_arguments():
    x, mask = masked((31, 34))
    x, mask = x.t(), mask[:, ::2]
    assert not x.is_contiguous() and not mask.is_contiguous()
    assert_identical(pack(mask), reference.bits_pack(mask))
    assert_identical(between(x, -0.3, 0.5), reference.bits_pack_between(x, -0.3, 0.5))
    bits = pack(masked(x.shape)[1]).repeat_interleave(2)[::2]
    assert not bits.is_contiguous()
    assert_identical(apply(x, bits, 0.3), reference.bits_apply(x, bits, 0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0] * 4, dtype=dtype)
    bits = torch.tensor([0b11111111, 0], dtype=torch.uint8)
    y = apply(x, bits, 2.0)
    assert_identical(y, reference.bits_apply(x, bits, 2.0))
    assert torch.equal(y[8:], torch.zeros(8, dtype=dtype))


def test_scale_keeps_its_precision_in_float64():
    x = torch.ones(8, dtype=torch.float64)
    bits = torch.full((1,), 255, dtype=torch.uint8)
    assert torch.equal(apply(x, bits, 1 / 0.9), x / 0.9)


def test_arguments_of_another_size_or_type():
    x, bits = torch.ones(9), torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"9 elements need 2 uint8 of bits, got 1"):
        apply(x, bits, 1.0)
    with pytest.raises(RuntimeError, match=r"got 2 torch\.int32"):
        apply(x, torch.zeros(2, dtype=torch.int32), 1.0)
    with pytest.raises(TypeError, match=r"bits_apply: expected .* got torch\.int64"):
        apply(x.long(), bits, 1.0)
    with pytest.raises(TypeError, match=r"bits_pack_between: expected .* got torch\.int64"):
        between(x.long(), 0.0, None)
    with pytest.raises(TypeError, match=r"bits_pack: expected a bool tensor, got torch\.uint8"):
        pack(bits)


def test_opcheck():
    x, mask = masked((3, 13))
    torch.library.opcheck(pack, (mask,))
    torch.library.opcheck(between, (x, None, 0.5))
    torch.library.opcheck(apply, (x, pack(mask), 1.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_relu(dtype):
    x = masked((17, 33))[0].to(dtype).requires_grad_()
    grad_out = masked((17, 33), seed=1)[0].to(dtype)
    (actual,) = torch.autograd.grad(memtl.functional.relu(x), x, grad_out)
    (expected,) = torch.autograd.grad(F.relu(x), x, grad_out)
    assert_identical(actual, expected)


def test_gradient_of_dropout():
    x = masked((17, 33))[0].float().requires_grad_()
    grad_out = masked((17, 33), seed=1)[0].float()
    torch.manual_seed(0)
    (actual,) = torch.autograd.grad(memtl.functional.dropout(x, 0.3), x, grad_out)
    torch.manual_seed(0)
    y = F.dropout(x, 0.3)
    assert_identical(actual, torch.where(y != 0, grad_out * (1 / 0.7), 0.0))


def test_gradcheck():
    x = masked(29)[0].requires_grad_()
    torch.autograd.gradcheck(memtl.functional.relu, x)
