"""The quant family in Triton's interpreter; test_interpreter.py runs this file.

It truncates float32 to bfloat16, where a GPU rounds: results in bfloat16 are left to tests/gpu.
"""

import itertools

import pytest
import torch
import triton.language as tl

import memtl
from memtl import _ops, kernels, reference
from memtl.kernels import quant, quant_norm
from memtl.reference.fused import ACTIVATIONS
from tests.helpers import assert_derivative_codes, assert_same, assert_within, gamma

ops = torch.ops.memtl
BITS = (8, 4, 3, 2)
EVERY_BITS = pytest.mark.parametrize("bits", BITS)
MADE = (torch.float32, torch.float64, torch.float16)
LO, HI = -0.13, 1.13


def draw(*size, dtype=torch.float32, special=False, seed=0):
    """Normal numbers; ``special``: with ties, both zeros, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    if special:
        values = (1.5, -1.5, 0.0, -0.0, torch.inf, -torch.inf, torch.nan)
        for start, value in enumerate(values):
            x.view(-1)[11 + start :: 97] = value
    return x


def assert_all_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous()
        assert_same(a, e)


def test_triton_serves():
    names = [name for name in _ops.NAMES if name.startswith("quant_")]
    assert names and {memtl.backends.owner(name, "cpu") for name in names} == {"triton"}


# ------------------------------------------------------------------------------- packing, reading


@pytest.mark.parametrize("dtype", _ops.FLOATING, ids=str)
@pytest.mark.parametrize("size", [(0,), (1,), (63,), (64,), (3, 437)], ids=str)
def test_pack(size, dtype):
    x = draw(*size, dtype=dtype)
    for bits in BITS:
        assert_all_same(ops.quant_pack(x, bits, 12345), reference.quant_pack(x, bits, 12345))
        arguments = (x, bits, LO, HI, -(2**40) - 1)
        assert_same(ops.quant_pack_range(*arguments), reference.quant_pack_range(*arguments))


@EVERY_BITS
def test_pack_what_is_special(bits):
    ends = torch.tensor([3.4e38, -3.4e38, 1e-45, -1e-39, 0.0, -0.0, 65504.0]).repeat(64)
    negative_nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    for x in (
        draw(40, 37, special=True),
        draw(37, 40).t(),
        ends[:64],
        ends[2:5].repeat(30),  # subnormal numbers
        torch.cat((ends[1::7], -ends[1::7])),
        torch.cat((draw(70), negative_nan)),
        draw(5).repeat_interleave(64),  # groups of one number
        draw(64, seed=1) * 1e-30 + 1e5,
    ):
        assert_all_same(
            ops.quant_pack(x, bits, 2**40 + 1), reference.quant_pack(x, bits, 2**40 + 1)
        )
        arguments = (x, bits, LO, HI, 7)
        assert_same(ops.quant_pack_range(*arguments), reference.quant_pack_range(*arguments))


@EVERY_BITS
def test_pack_normalized(bits):
    x = draw(40, 37, special=True)
    # Of rows, of columns, of one channel; runs shorter than a group, of many channels and of few.
    for channels, inner in ((40, 37), (37, 1), (5, 4), (1, 1), (1, 1480), (8, 185), (20, 74)):
        mean, rstd = draw(channels, seed=1), draw(channels, dtype=torch.float16, seed=2)
        arguments = (x, mean, rstd, bits, inner, 5)
        expected = reference.quant_pack_normalized(*arguments)
        assert_all_same(ops.quant_pack_normalized(*arguments), expected)
    assert ops.quant_pack_normalized(x[:0], mean, rstd, bits, 74, 5)[0].shape == (0, 8 * bits)


@EVERY_BITS
def test_offsets_beyond_32_bits(bits, monkeypatch):
    """What a tensor of more than 2^31 elements is compiled with."""
    wide = lambda numel, inner: {"NARROW": inner < 64, "INDEX": tl.int64}  # noqa: E731
    monkeypatch.setattr(quant, "channel_options", wide)
    for channels, inner in ((9, 100), (100, 9)):
        mean, rstd = draw(channels, seed=1), draw(channels, seed=2)
        arguments = (draw(900), mean, rstd, bits, inner, 5)
        expected = reference.quant_pack_normalized(*arguments)
        assert_all_same(ops.quant_pack_normalized(*arguments), expected)


@EVERY_BITS
def test_unpack(bits):
    for x in (draw(40, 37, special=True), draw(64), draw(0), draw(1)):
        packed, size = reference.quant_pack(x, bits, 1), list(x.shape)
        codes = reference.quant_pack_range(x, bits, LO, HI, 1)
        for dtype in MADE:
            expected = reference.quant_unpack(*packed, bits, size, dtype)
            assert_all_same([ops.quant_unpack(*packed, bits, size, dtype)], [expected])
            arguments = (codes, bits, LO, HI, size, dtype)
            expected = reference.quant_unpack_range(*arguments)
            assert_all_same([ops.quant_unpack_range(*arguments)], [expected])


def test_codes_that_lie_elsewhere():
    """Not contiguous, or from an odd address on."""
    codes, params = reference.quant_pack(draw(640), 3, 1)
    expected = reference.quant_unpack(codes, params, 3, [640], torch.float32)
    odd = torch.cat((codes.new_zeros(1), codes.flatten()))[1:].view(codes.shape)
    odd_params = torch.cat((params.new_zeros(1), params.flatten()))[1:].view(params.shape)
    apart = codes.repeat_interleave(2, 1)[:, ::2]
    for given in ((odd, odd_params), (apart, params.repeat_interleave(2, 0)[::2])):
        assert_same(ops.quant_unpack(*given, 3, [640], torch.float32), expected)


# -------------------------------------------------------------------------------- used at once


@EVERY_BITS
def test_unpack_affine(bits):
    x = draw(40, 37, special=True)
    packed, size = reference.quant_pack(x, bits, 1), list(x.shape)
    mask = reference.bits_pack(draw(40, 37, seed=2) > 0)
    cases = ((37, 37, 1), (40, None, 37), (None, 1, 1), (1, 5, 4), (8, 8, 185), (None, None, 1))
    for i, (weights, biases, inner) in enumerate(cases):
        dtype = MADE[i % 3]
        weight = None if weights is None else draw(weights, dtype=dtype, seed=3)
        bias = None if biases is None else draw(biases, seed=4)
        for given, *ends in ((None,), (mask,), (mask, 0.0, 6.0), (mask, -0.25)):
            arguments = (*packed, bits, weight, bias, given, inner, size, dtype, *ends)
            expected = reference.quant_unpack_affine(*arguments)
            assert_all_same([ops.quant_unpack_affine(*arguments)], [expected])


@EVERY_BITS
def test_apply_range(bits):
    grad_out = draw(37, 40).t()
    codes = reference.quant_pack_range(draw(40, 37, special=True), bits, LO, HI, 1)
    for dtype in MADE:
        arguments = (grad_out.to(dtype), codes, bits, LO, HI)
        expected = reference.quant_apply_range(*arguments)
        assert_all_same([ops.quant_apply_range(*arguments)], [expected])


def curve_inputs():
    """Groups of 8 bits that hold finite numbers to far beyond where curves bend; NaN in one."""
    x = torch.cat((draw(1000) * 4, torch.linspace(-120, 120, 600), torch.full((3,), torch.nan)))
    codes, params = reference.quant_pack(x, 8, 1)
    return codes, params, reference.quant_unpack(codes, params, 8, [x.numel()], torch.float32)


@pytest.mark.parametrize("activation", _ops.ACTIVATIONS)
def test_activations(activation):
    f, derivative = ACTIVATIONS[activation]
    codes, params, x = curve_inputs()
    size, grad_out = list(x.shape), draw(*x.shape, seed=1)
    exact, slope = f(x.double()), derivative(x.double())
    nan = x.isnan()
    y = ops.quant_unpack_activation(codes, params, 8, activation, size, torch.float32)
    assert torch.equal(y.isnan(), nan) and nan.any()
    assert_within(y[~nan], exact[~nan], 5e-7 * x[~nan].double().abs().clamp_min(1))
    grad = ops.quant_activation_grad(grad_out, codes, params, 8, activation)
    assert torch.equal(grad.isnan(), nan)
    assert_within(grad[~nan], (slope * grad_out)[~nan], 6e-7 * grad_out[~nan].double().abs())
    half = ops.quant_activation_grad(grad_out.half(), codes, params, 8, activation)
    bound = 2e-3 * (1 + grad.double().abs())
    assert half.dtype == torch.float16 and half.is_contiguous()
    assert_within(half[~nan], grad[~nan], bound[~nan])


@pytest.mark.parametrize("activation", _ops.ACTIVATIONS)
def test_pack_derivative(activation):
    x = torch.cat((4 * draw(1000, special=True), torch.tensor([3.0, -3.0, 1e30, -1e30])))
    for bits, dtype in zip(BITS, _ops.FLOATING, strict=True):
        arguments = x.to(dtype), bits, activation, LO, HI, 2**40 + 1
        assert_derivative_codes(ops.quant_pack_derivative(*arguments), *arguments, 5e-7)
    assert ops.quant_pack_derivative(x[:0], 4, activation, LO, HI, 9).shape == (0, 32)


# --------------------------------------------------------------------------------------- norms


def norm_cases():
    """Arguments of quant_norm_grad; rows that are whole groups and that are not."""
    shapes = ((8, 5, 128), (4, 33, 7), (3, 6, 257), (2, 70, 1), (4, 0, 8))
    for i, (bits, rows, features) in enumerate(shapes):
        packed = reference.quant_pack(draw(rows, features), bits, 1)
        grad_out = draw(features, rows, dtype=MADE[i % 2], seed=1).t()
        weight = None if i == 2 else draw(features, dtype=torch.float16, seed=3)
        yield grad_out, *packed, bits, draw(rows, seed=2), weight, features, i != 1


def assert_gradients(op, arguments, sizes):
    """Of sums of so many terms, in another order, and what comes of them."""
    name, (own, *sums) = op._qualified_op_name.split("::")[1], op(*arguments)
    definition = getattr(reference, name)
    expected, *expected_sums = definition(*arguments)
    assert own.dtype == expected.dtype and own.is_contiguous()
    largest = torch.linalg.vector_norm(expected.double(), torch.inf) if expected.numel() else 0
    assert_within(own, expected, 20 * gamma(sizes[0]) * (1 + largest))
    for actual, e in zip(sums, expected_sums, strict=True):
        assert actual.dtype == torch.float32 and actual.is_contiguous()
        assert_within(actual, e, 10 * gamma(sizes[1]) * max(sizes[1], 1))


def test_norm_gradients():
    for arguments in norm_cases():
        rows, features = arguments[0].shape
        assert_gradients(ops.quant_norm_grad, arguments, (features + 9, rows))


def test_norm_gradients_of_rows_that_are_read_twice(monkeypatch):
    for name, value in (("WIDEST", 64), ("PROGRAMS", 3), ("LEAST", 1), ("TILE", 128)):
        monkeypatch.setattr(quant_norm, name, value)
    for arguments in itertools.islice(norm_cases(), 3):
        rows, features = arguments[0].shape
        assert_gradients(ops.quant_norm_grad, arguments, (features + 9, rows))


def channel_norm_cases():
    """Maps that are whole groups and that are not, larger than a tile, smaller, and of one."""
    shapes = ((8, 3, 5, 64), (4, 2, 3, 49), (3, 2, 2, 2500), (2, 9, 128, 1), (4, 3, 5, 1))
    for i, (bits, *shape) in enumerate((*shapes, (4, 0, 3, 5))):
        packed = reference.quant_pack(draw(*shape), bits, 1)
        grad_out = draw(*shape, dtype=MADE[i % 2], seed=1)
        weight = None if i == 1 else draw(shape[1], dtype=torch.float16, seed=3)
        yield grad_out, *packed, bits, draw(shape[1], seed=2), weight, shape[2]


def test_channel_norm_gradients():
    for arguments in channel_norm_cases():
        terms = arguments[0].numel() // arguments[0].shape[1]
        assert_gradients(ops.quant_channel_norm_grad, arguments, (terms + 9, terms))


# ----------------------------------------------------------------------------------- arguments


def test_arguments_that_do_not_fit():
    x, (codes, params) = draw(70), reference.quant_pack(draw(70), 4, 1)
    w, size, half = draw(7), [70], torch.float16
    for error, said, call in (
        (TypeError, r"got torch\.int64", lambda: kernels.OPS["quant_pack"](x.long(), 4, 0)),
        (ValueError, r"bits 8, 4, 3 or 2, got 5", lambda: ops.quant_pack(x, 5, 0)),
        (
            ValueError,
            r"lo < hi, got 1\.0 and 0\.0",
            lambda: ops.quant_pack_range(x, 4, 1.0, 0.0, 0),
        ),
        (
            ValueError,
            r"numbers of float32, got 0\.0 and 1e\+39",
            lambda: ops.quant_pack_range(x, 4, 0.0, 1e39, 0),
        ),
        (
            RuntimeError,
            r"need codes \[2, 24\], got \[2, 32\]",
            lambda: ops.quant_unpack(codes, params, 3, size, half),
        ),
        (
            RuntimeError,
            r"params of bfloat16 \[2, 2\], got torch\.float32",
            lambda: ops.quant_unpack(codes, params.float(), 4, size, half),
        ),
        (
            TypeError,
            r"a result in .* got torch\.int32",
            lambda: ops.quant_unpack(codes, params, 4, size, torch.int32),
        ),
        (
            RuntimeError,
            r"mean and rstd of one size, got \[7\] and \[6\]",
            lambda: ops.quant_pack_normalized(x, w, w[:6], 4, 10, 0),
        ),
        (
            RuntimeError,
            r"7 channels of 3 do not divide 70 elements",
            lambda: ops.quant_pack_normalized(x, w, w, 4, 3, 0),
        ),
        (
            ValueError,
            r"inner > 0, got 0",
            lambda: ops.quant_unpack_affine(codes, params, 4, w, None, None, 0, size, half),
        ),
        (
            RuntimeError,
            r"need 9 uint8 of mask, got 2",
            lambda: ops.quant_unpack_affine(codes, params, 4, w, w, codes[:, 0], 1, size, half),
        ),
        (
            ValueError,
            r"got 'relu'",
            lambda: ops.quant_unpack_activation(codes, params, 4, "relu", size, half),
        ),
        (
            RuntimeError,
            r"is no rows of 9",
            lambda: ops.quant_norm_grad(x, codes, params, 4, w, None, 9, True),
        ),
        (
            RuntimeError,
            r"expected rstd of 10 elements, got \(7,\)",
            lambda: ops.quant_norm_grad(x, codes, params, 4, w, None, 7, True),
        ),
        (
            RuntimeError,
            r"expected weight of 7 elements, got \(6,\)",
            lambda: ops.quant_channel_norm_grad(x, codes, params, 4, w, w[:6], 10),
        ),
    ):
        with pytest.raises(error, match=said):
            call()


def test_opcheck():
    x = draw(3, 70)
    packed, w = reference.quant_pack(x, 4, 1), draw(70)
    codes = reference.quant_pack_range(x, 4, LO, HI, 1)
    for op, arguments in (
        (ops.quant_pack, (x, 4, 1)),
        (ops.quant_pack_normalized, (x, w, w, 4, 1, 1)),
        (ops.quant_unpack, (*packed, 4, [3, 70], torch.float16)),
        (ops.quant_pack_range, (x, 4, LO, HI, 1)),
        (ops.quant_unpack_range, (codes, 4, LO, HI, [3, 70], torch.float16)),
        (ops.quant_unpack_affine, (*packed, 4, w, w, None, 1, [3, 70], torch.float32)),
        (ops.quant_unpack_activation, (*packed, 4, "gelu", [3, 70], torch.float32)),
        (ops.quant_activation_grad, (x, *packed, 4, "mish")),
        (ops.quant_pack_derivative, (x, 4, "silu", LO, HI, 1)),
        (ops.quant_apply_range, (x, codes, 4, LO, HI)),
        (ops.quant_norm_grad, (x, *packed, 4, w[:3], w, 70, True)),
        (ops.quant_channel_norm_grad, (x, *packed, 4, w[:3], w[:3], 70)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
