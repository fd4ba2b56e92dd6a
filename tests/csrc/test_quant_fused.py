"""quant decoded and used at once, or computed and packed, in C++: affine maps and fixed ranges
against the reference bit for bit, activations against float64 within the bound that
csrc/cpu/quant_math.h states."""

import itertools
import math

import pytest
import torch

import memtl  # noqa: F401  (defines and registers the operators)
from memtl import reference
from memtl._ops import ACTIVATIONS
from memtl.reference.fused import ACTIVATIONS as DEFINITIONS
from tests.csrc.test_quant import BITS, DTYPES, HI, KINDS, LO, SIZES, assert_identical, data
from tests.helpers import (
    assert_derivative_codes,
    assert_within,
    exact_activation,
    gamma,
    unit,
)

ops = torch.ops.memtl
BOUND = 5e-7
# (channels, inner): rows shorter and longer than a group, runs of one to more than a group.
PLACES = [(1, 1), (7, 1), (64, 1), (96, 1), (1000, 1), (3, 2), (5, 9), (2, 64), (3, 100), (1, 333)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_affine(isa, bits, dtype):
    for (channels, inner), times in itertools.product(PLACES, (0, 1, 3)):
        n = channels * inner * times
        packed = reference.quant_pack(data("wide", n), bits, 3)
        w, b = data("normal", channels, dtype), data("normal", channels + 1)[1:]
        mask = reference.bits_pack(data("normal", n) > 0)
        for *given, ends in (
            (w, b, None, ()), (w, None, mask, (0.0, 6.0)), (None, b, mask, ()),
            (w, b, mask, (-0.7, 1.1)), (w, b, mask, (0.25, None)), (None, None, None, ()),
        ):  # fmt: skip
            arguments = (*packed, bits, *given, inner, [n], dtype, *ends)
            assert_identical(
                ops.quant_unpack_affine(*arguments), reference.quant_unpack_affine(*arguments)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_affine_of_any_data(isa, kind):
    packed = reference.quant_pack(data(kind, 600), 4, 3)
    w, b = data(kind, 12), data(kind, 12)
    mask = reference.bits_pack(data("normal", 600) > 0)
    for rest in (
        (None, 10, [5, 12, 10], torch.float32),
        (mask, 10, [600], torch.float32, 0.0, 6.0),
    ):
        arguments = (*packed, 4, w, b, *rest)
        result = ops.quant_unpack_affine(*arguments)
        assert_identical(result, reference.quant_unpack_affine(*arguments))


def test_affine_of_strided_arguments(isa):
    packed = reference.quant_pack(data("normal", 640), 4, 1)
    w, b = data("normal", 20)[::2], data("normal", 10).view(2, 5).t()
    arguments = (*packed, 4, w, b, None, 1, [64, 10], torch.float32)
    result = ops.quant_unpack_affine(*arguments)
    assert_identical(result, reference.quant_unpack_affine(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_pack_normalized(isa, bits, dtype):
    for (channels, inner), times, seed in itertools.product(PLACES, (0, 1, 3), (0, -7)):
        x = data("normal", channels * inner * times, dtype) * 3
        mean, rstd = data("normal", channels, dtype), data("normal", channels + 1)[1:].abs()
        found = ops.quant_pack_normalized(x, mean, rstd, bits, inner, seed)
        x_hat = x.float().view(times, channels, inner) - mean.float().view(-1, 1)
        expected = ops.quant_pack(x_hat * rstd.view(-1, 1), bits, seed)
        definition = reference.quant_pack_normalized(x, mean, rstd, bits, inner, seed)
        for a, b, c in zip(found, expected, definition, strict=True):
            assert_identical(a, b)
            assert_identical(a, c)


@pytest.mark.parametrize("kind", KINDS)
def test_pack_normalized_of_any_data(isa, kind):
    mean, rstd = data(kind, 12), data(kind, 12)
    for inner, shape in ((10, (5, 12, 10)), (50, (12, 50)), (1, (50, 12))):
        arguments = (data(kind, 600).view(shape), mean, rstd, 4, inner, 3)
        result = ops.quant_pack_normalized(*arguments)
        for a, b in zip(result, reference.quant_pack_normalized(*arguments), strict=True):
            assert_identical(a, b)


def test_pack_normalized_of_strided_arguments(isa):
    mean, rstd = data("normal", 20)[::2], data("normal", 10).view(2, 5).t()
    arguments = (data("normal", 640).view(10, 64).t(), mean, rstd, 4, 1, 3)
    result = ops.quant_pack_normalized(*arguments)
    for a, b in zip(result, reference.quant_pack_normalized(*arguments), strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bits", BITS)
def test_activations(isa, name, bits):
    for kind, n in itertools.product(("normal", "relu", "offset", "tiny", "huge", "wide"), SIZES):
        for scale in (1.0, 10.0):
            codes, params = reference.quant_pack(data(kind, n) * scale, bits, 3)
            x = reference.quant_unpack(codes, params, bits, [n], torch.float32)
            y, slope = exact_activation(name, x)
            found = ops.quant_unpack_activation(codes, params, bits, name, [n], torch.float32)
            grad = ops.quant_activation_grad(torch.ones(n), codes, params, bits, name)
            assert found[x.isnan()].isnan().all() and grad[x.isnan()].isnan().all()
            finite = x.isfinite()  # the rest: test_what_is_not_finite
            size = x.double().abs().clamp_min(1)[finite]
            assert_within(found[finite] / size, y[finite] / size, BOUND)
            assert_within(grad[finite], slope[finite], BOUND)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_a_fine_grid(isa, name):
    """Steps of 0.002, between them every float32 that is a code times a scale."""
    x = torch.linspace(-30, 30, 30_000)
    codes, params = ops.quant_pack(x, 8, 0)
    x = ops.quant_unpack(codes, params, 8, [30_000], torch.float32)
    y, slope = exact_activation(name, x)
    found = ops.quant_unpack_activation(codes, params, 8, name, [30_000], torch.float32)
    size = x.double().abs().clamp_min(1)
    assert_within(found / size, y / size, BOUND)
    found = ops.quant_activation_grad(torch.ones(30_000), codes, params, 8, name)
    assert_within(found, slope, BOUND)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite(isa, name, bits):
    x = data("normal", 300)
    x[70] = math.nan
    codes, params = reference.quant_pack(x, bits, 3)
    found = ops.quant_unpack_activation(codes, params, bits, name, [300], torch.float32)
    grad = ops.quant_activation_grad(torch.ones(300), codes, params, bits, name)
    for result in (found, grad):
        assert result[64:128].isnan().all()
        assert result[:64].isfinite().all() and result[128:].isfinite().all()
    # Groups of one infinity: what decodes beyond float32 has the limits.
    params = torch.tensor([[1.0, math.inf], [1.0, -math.inf]]).bfloat16()
    codes = torch.zeros(2, 8 * bits, dtype=torch.uint8)
    found = ops.quant_unpack_activation(codes, params, bits, name, [128], torch.float32)
    assert (found[:64] == math.inf).all()
    assert_within(found[64:], torch.zeros(64), BOUND)
    grad = ops.quant_activation_grad(torch.ones(128), codes, params, bits, name)
    assert_within(grad, torch.tensor([1.0, 0.0]).repeat_interleave(64), BOUND)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_roundings_of_float32(isa, dtype):
    for n, bits in itertools.product(SIZES, BITS):
        codes, params = reference.quant_pack(data("normal", n), bits, 3)
        wide = ops.quant_unpack_activation(codes, params, bits, "gelu", [n], torch.float32)
        found = ops.quant_unpack_activation(codes, params, bits, "gelu", [n], dtype)
        assert_identical(found, wide.to(dtype))
        g = data("normal", n + 1)[1:].to(dtype)
        wide = ops.quant_activation_grad(g.float(), codes, params, bits, "gelu")
        found = ops.quant_activation_grad(g, codes, params, bits, "gelu")
        assert_identical(found, wide.to(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bits", BITS)
def test_pack_derivative(isa, name, bits):
    kinds = ("normal", "relu", "tiny", "wide", "broken")
    for (kind, dtype), n in itertools.product(itertools.product(kinds, DTYPES), SIZES):
        x, seed = (data(kind, n).double() * 3).to(dtype), n - 64
        codes = ops.quant_pack_derivative(x, bits, name, LO, HI, seed)
        assert_derivative_codes(codes, x, bits, name, LO, HI, seed, BOUND)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_pack_derivative_of_a_fine_grid(isa, name):
    """Against the definition: a level in a thousand differs at most, by one."""
    x = torch.linspace(-12, 12, 30_001)
    arguments = (x, 8, name, LO, HI, 2**40 + 1)
    codes = ops.quant_pack_derivative(*arguments)
    assert_derivative_codes(codes, *arguments, BOUND)
    apart = codes.int() - reference.quant_pack_derivative(*arguments).int()
    assert apart.abs().max() <= 1 and apart.count_nonzero() <= 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_apply_range(isa, bits, dtype):
    codes = torch.arange(64 * bits * 33).remainder(256).to(torch.uint8).view(-1, 8 * bits)
    n = codes.shape[0] * 64 - 5
    for kind in KINDS:
        g = data(kind, n).to(dtype)
        assert_identical(
            ops.quant_apply_range(g, codes, bits, LO, HI),
            reference.quant_apply_range(g, codes, bits, LO, HI),
        )


def norm_grad_in_float64(g, x_hat, rstd, weight, centered):
    g, x = g.double(), x_hat.double()
    scaled = g if weight is None else g * weight.double()
    own = scaled - x * (scaled * x).mean(1, keepdim=True)
    own = own - scaled.mean(1, keepdim=True) if centered else own
    return own * rstd.double().view(-1, 1), (g * x).sum(0), g.sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_norm_grad(isa, bits, dtype):
    for rows, n in ((0, 5), (1, 1), (3, 7), (5, 64), (33, 43), (100, 130), (7, 1000)):
        x, g = data("normal", rows * n).view(rows, n), torch.randn(rows, n).to(dtype)
        packed = reference.quant_pack(x, bits, 3)
        x_hat = reference.quant_unpack(*packed, bits, [rows, n], torch.float32)
        rstd = torch.rand(rows, 1) + 0.5
        for weight, centered in ((torch.randn(n).to(dtype), True), (None, True), (None, False)):
            found = ops.quant_norm_grad(g, *packed, bits, rstd, weight, n, centered)
            exact = norm_grad_in_float64(g, x_hat, rstd, weight, centered)
            assert found[0].dtype == dtype and found[1].dtype == found[2].dtype == torch.float32
            w = torch.ones(n) if weight is None else weight
            size, width = (g * w).double().abs(), x_hat.double().abs()
            terms = size + size.mean(1, keepdim=True) + width * (size * width).mean(1, keepdim=True)
            u = unit(dtype) if dtype != torch.float64 else 0
            bound = gamma(n + 6) * terms * rstd + u * exact[0].abs()
            assert_within(found[0], exact[0], bound * (1 + 1e-6) + 1e-7 * (dtype == torch.float16))
            assert_within(found[1], exact[1], gamma(rows + 2) * (g.double().abs() * width).sum(0))
            assert_within(found[2], exact[2], gamma(rows + 2) * g.double().abs().sum(0))


def test_norm_grad_of_what_is_not_finite(isa):
    """A row with a broken group, and its columns; not the row that shares a group with it."""
    x = data("normal", 3 * 100).view(3, 100).clone()
    x[0, 10] = math.nan
    packed, ones = reference.quant_pack(x, 4, 3), torch.ones(3, 100)
    grad_x, grad_weight, _ = ops.quant_norm_grad(ones, *packed, 4, ones[:, 0], None, 100, True)
    assert grad_x[0].isnan().all() and grad_x[1:].isfinite().all()
    assert grad_weight[:64].isnan().all() and grad_weight[64:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_channel_norm_grad(isa, bits, dtype):
    places = [(0, 3, 5), (1, 1, 1), (9, 7, 1), (3, 5, 9), (5, 3, 49), (2, 3, 1100), (3, 2, 64)]
    for batch, channels, inner in places:
        n = batch * channels * inner
        g = torch.randn(batch, channels, inner).to(dtype)
        packed = reference.quant_pack(data("normal", n), bits, 3)
        x = reference.quant_unpack(*packed, bits, list(g.shape), torch.float32).double()
        rstd = torch.rand(channels) + 0.5
        for weight in (torch.randn(channels).to(dtype), None):
            found = ops.quant_channel_norm_grad(g, *packed, bits, rstd, weight, inner)
            assert found[0].dtype == dtype and found[1].dtype == found[2].dtype == torch.float32
            wide, slope = g.double(), rstd.double().view(-1, 1)
            slope = slope if weight is None else slope * weight.double().view(-1, 1)
            mean, along = (t.mean((0, 2)).view(-1, 1) for t in (wide, wide * x))
            exact = (wide - mean - x * along) * slope
            size, width, u = wide.abs(), x.abs(), unit(dtype) if dtype != torch.float64 else 0
            terms = size + size.mean((0, 2)).view(-1, 1)
            terms = terms + width * (size * width).mean((0, 2)).view(-1, 1)
            # A float32 sum is of 64 terms at most, and of 16 lanes.
            bound = gamma(80) * terms * slope.abs() + u * exact.abs()
            assert_within(found[0], exact, bound * (1 + 1e-6) + 1e-7 * (dtype == torch.float16))
            assert_within(found[1], (wide * x).sum((0, 2)), gamma(80) * (size * width).sum((0, 2)))
            assert_within(found[2], wide.sum((0, 2)), gamma(80) * size.sum((0, 2)))


def test_channel_norm_grad_of_what_is_not_finite(isa):
    """A channel with a broken group; not the one that shares the group with it."""
    x = data("normal", 3 * 100).view(1, 3, 100).clone()
    x[0, 0, 10] = math.nan
    packed, ones = reference.quant_pack(x, 4, 3), torch.ones(1, 3, 100)
    grads = ops.quant_channel_norm_grad(ones, *packed, 4, torch.ones(3), None, 100)
    assert grads[0][0, 0].isnan().all() and grads[0][0, 1:].isfinite().all()
    assert grads[1][0].isnan() and grads[1][1:].isfinite().all() and grads[2].isfinite().all()


def test_strided_gradients(isa):
    x = data("normal", 4 * 6 * 10).view(4, 6, 10)
    for view in (x.transpose(0, 2), x[:, ::2], x[1:, :, 3:], x[:, :, :0], x.permute(1, 2, 0)[None]):
        codes, params = reference.quant_pack(view, 4, 1)
        ranged = reference.quant_pack_range(view, 4, LO, HI, 1)
        for call in (
            lambda g, c=codes, p=params: ops.quant_activation_grad(g, c, p, 4, "mish"),
            lambda g, c=ranged: ops.quant_apply_range(g, c, 4, LO, HI),
            lambda g: ops.quant_pack_derivative(g, 3, "silu", LO, HI, 1),
        ):
            found = call(view)
            assert found.is_contiguous()
            assert_identical(found, call(view.contiguous()))


def test_instruction_sets_and_threads_agree():
    native = pytest.importorskip("memtl._C")
    x, n = data("normal", 43 * 7001) * 4, 43 * 7001
    codes, params = ops.quant_pack(x, 3, 9)
    isa, threads = native.isa(), torch.get_num_threads()
    results = []
    try:
        for torch_threads, name in itertools.product((1, 3), native.isas()):
            torch.set_num_threads(torch_threads)
            native.set_isa(name)
            w = x[:n]
            results.append(
                (
                    ops.quant_unpack_affine(codes, params, 3, w, w, None, 1, [n], torch.float32),
                    *ops.quant_pack_normalized(x, w[:7001], w[7001:14002], 3, 43, 1),
                    *(ops.quant_activation_grad(x, codes, params, 3, a) for a in ACTIVATIONS),
                    *(ops.quant_pack_derivative(x, 8, a, LO, HI, 1) for a in ACTIVATIONS),
                    *ops.quant_norm_grad(x, codes, params, 3, x[: n // 43], x[:43], 43, True),
                    *ops.quant_channel_norm_grad(x, codes, params, 3, w[:7001], w[:7001], 43),
                    *ops.quant_channel_norm_grad(x, codes, params, 3, w[:43], None, 7001),
                )
            )
    finally:
        native.set_isa(isa)
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


def test_errors_name_the_tensor():
    pytest.importorskip("memtl._C")
    x = torch.randn(100)
    packed, size = ops.quant_pack(x, 4, 0), [100]
    affine = ops.quant_unpack_affine
    with pytest.raises(RuntimeError, match="7 channels of 1 do not divide 100 elements"):
        affine(*packed, 4, x[:7], None, None, 1, size, torch.float32)
    with pytest.raises(RuntimeError, match="weight and bias of one size, got 10 and 20"):
        affine(*packed, 4, x[:10], x[:20], None, 1, size, torch.float32)
    pack = ops.quant_pack_normalized
    with pytest.raises(RuntimeError, match="7 channels of 1 do not divide 100 elements"):
        pack(x, x[:7], x[:7], 4, 1, 0)
    with pytest.raises(RuntimeError, match=r"of one size, got Float \[10\] and Float \[20\]"):
        pack(x, x[:10], x[:20], 4, 1, 0)
    with pytest.raises(RuntimeError, match="quant_pack_normalized: expected inner > 0, got 0"):
        pack(x, x, x, 4, 0, 0)
    with pytest.raises(RuntimeError, match="expected mean in float32, .*, got Long"):
        pack(x, x.long(), x, 4, 1, 0)
    with pytest.raises(RuntimeError, match="inner > 0, got 0"):
        affine(*packed, 4, x, None, None, 0, size, torch.float32)
    with pytest.raises(RuntimeError, match="expected weight in float32, .*, got Long"):
        affine(*packed, 4, x.long(), None, None, 1, size, torch.float32)
    with pytest.raises(RuntimeError, match="needs 13 bytes of bits"):
        affine(*packed, 4, x, None, torch.zeros(12).byte(), 1, size, torch.float32)
    with pytest.raises(RuntimeError, match="expected lo < hi, got lo 2 and hi 1"):
        affine(*packed, 4, x, None, None, 1, size, torch.float32, 2.0, 1.0)
    with pytest.raises(RuntimeError, match="expected gelu, .* or mish, got relu"):
        ops.quant_activation_grad(x, *packed, 4, "relu")
    with pytest.raises(RuntimeError, match=r"130 elements in 4 bits need codes \[3, 32\]"):
        ops.quant_activation_grad(torch.randn(130), *packed, 4, "gelu")
    derivative = ops.quant_pack_derivative
    with pytest.raises(RuntimeError, match="expected x in float32, .*, got Long"):
        derivative(x.long(), 4, "gelu", 0.0, 1.0, 0)
    with pytest.raises(RuntimeError, match="expected bits 8, 4, 3 or 2, got 5"):
        derivative(x, 5, "gelu", 0.0, 1.0, 0)
    with pytest.raises(RuntimeError, match="quant_pack_derivative: expected gelu, .*, got relu"):
        derivative(x, 4, "relu", 0.0, 1.0, 0)
    with pytest.raises(RuntimeError, match="quant_pack_derivative: expected lo < hi, got 1 and 0"):
        derivative(x, 4, "gelu", 1.0, 0.0, 0)
    with pytest.raises(RuntimeError, match="numbers of float32, got 0 and inf"):
        derivative(x, 4, "gelu", 0.0, math.inf, 0)
    with pytest.raises(RuntimeError, match="quant_apply_range: expected lo < hi, got 1 and 0"):
        ops.quant_apply_range(x, packed[0], 4, 1.0, 0.0)


def test_the_definitions_are_as_close():
    """torch's own functions in float32, away from the infinities; its sigmoid is off by 1e-6."""
    x = torch.linspace(-20, 20, 10_001)
    for name, (f, derivative) in DEFINITIONS.items():
        y, slope = exact_activation(name, x)
        size = x.double().abs().clamp_min(1)
        assert_within(f(x) / size, y / size, BOUND)
        assert_within(derivative(x), slope, 1e-6 + unit(torch.float32))


@pytest.mark.parametrize("inner", [2**62, 2**63 - 1, 3])
def test_channels_that_do_not_divide_are_refused(isa, inner):
    """By the exact quotient: the product of channels and inner may overflow, to 0 even."""
    x, number = torch.randn(4, 64), torch.ones(4)
    codes = torch.ops.memtl.quant_pack(x, 4, 0)
    calls = (
        lambda: ops.quant_unpack_affine(
            *codes, 4, number, None, None, inner, [4, 64], torch.float32
        ),
        lambda: ops.quant_pack_normalized(x, number, number, 4, inner, 0),
        lambda: ops.quant_channel_norm_grad(x, *codes, 4, number, None, inner),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="do not divide 256 elements"):
            call()
