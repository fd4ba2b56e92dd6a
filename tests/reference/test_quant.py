"""Few-bit codes: bounds, directions of rounding, an unbiased mean, and the layout."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from memtl._ops import ACTIVATIONS
from memtl.reference.quant import bfloat16_down, bfloat16_up, dither
from tests.helpers import assert_derivative_codes, assert_same, assert_within

GROUP = 64
BITS = (8, 4, 3, 2)
SIZES = (1, 7, 63, 64, 65, 255, 256, 257, 600)
EVERY_BITS = pytest.mark.parametrize("bits", BITS)
EVERY_SIZE = pytest.mark.parametrize("n", SIZES)


def round_trip(ops, x, bits, seed=0, dtype=torch.float32):
    codes, params = ops.quant_pack(x, bits, seed)
    return ops.quant_unpack(codes, params, bits, list(x.shape), dtype)


def decode(codes: torch.Tensor, bits: int) -> np.ndarray:
    """The documented layout, in plain numpy: [groups, 64] integers."""
    packed = codes.numpy()
    out = np.zeros((packed.shape[0], GROUP), dtype=np.int64)
    if bits == 3:
        for e in range(GROUP):
            low = packed[:, e % 16] >> (e // 16 * 2) & 3
            out[:, e] = low + 4 * (packed[:, 16 + e // 8] >> (e % 8) & 1)
        return out
    for byte in range(8 * bits):
        for i in range(8 // bits):
            out[:, byte + i * 8 * bits] = (packed[:, byte] >> (i * bits)) & (2**bits - 1)
    return out


def per_element(params: torch.Tensor, n: int):
    """scale and offset of each of n elements, in float64."""
    wide = params.double().repeat_interleave(GROUP, 0)[:n]
    return wide[:, 0], wide[:, 1]


@EVERY_BITS
@EVERY_SIZE
def test_layout_and_decoding(ops, bits, n):
    x = torch.randn(n)
    codes, params = ops.quant_pack(x, bits, 3)
    groups = -(-n // GROUP)
    assert codes.shape == (groups, 8 * bits) and codes.dtype == torch.uint8
    assert params.shape == (groups, 2) and params.dtype == torch.bfloat16
    integers = torch.from_numpy(decode(codes, bits))
    wide = params.float()
    # One multiplication and one addition in float32, fused or not.
    exact = integers.double() * wide[:, :1].double() + wide[:, 1:].double()
    dense = ops.quant_unpack(codes, params, bits, [n], torch.float32)
    size = integers * wide[:, :1].double() + wide[:, 1:].double().abs()
    assert_within(dense, exact.flatten()[:n], size.flatten()[:n] * 2**-23)


@EVERY_BITS
@EVERY_SIZE
@pytest.mark.parametrize("loc, size", [(0, 1), (100, 1), (0, 1e-20), (-3, 1e30), (7e4, 3e4)])
def test_error_is_within_one_step(ops, bits, n, loc, size):
    x = torch.randn(n) * size + loc
    codes, params = ops.quant_pack(x, bits, 1)
    dense = ops.quant_unpack(codes, params, bits, [n], torch.float32)
    scale, offset = per_element(params, n)
    rounding = (offset.abs() + scale * (2**bits - 1)) * 2**-22
    assert_within(dense, x, scale + rounding)


@EVERY_BITS
@EVERY_SIZE
def test_offset_is_rounded_down_and_scale_up(ops, bits, n):
    """So every element lies inside the coded range; neither is further out than one bfloat16."""
    x = torch.randn(n) * 5 + 2
    _, params = ops.quant_pack(x, bits, 0)
    padded = torch.cat((x, x[-1:].expand(-n % GROUP))).view(-1, GROUP)
    lo, hi = padded.amin(1), padded.amax(1)
    scale, offset = params[:, 0], params[:, 1]
    assert (offset.float() <= lo).all()
    assert (torch.nextafter(offset, torch.full_like(offset, math.inf)).float() > lo).all()
    wanted = (hi.double() - offset.double()) / (2**bits - 1)
    assert (scale.double() >= wanted * (1 - 2**-22)).all()
    below = torch.nextafter(scale, torch.zeros_like(scale)).double()
    assert ((below < wanted * (1 + 2**-22)) | (scale.double() == 2.0**-126)).all()


@EVERY_BITS
def test_mean_over_seeds_is_exact(ops, bits):
    """Within four standard errors, of each element and of all of them together."""
    x, seeds = torch.randn(128), 2000
    _, params = ops.quant_pack(x, bits, 0)
    scale, _ = per_element(params, 128)
    errors = torch.stack([round_trip(ops, x, bits, seed).double() - x for seed in range(seeds)])
    errors = errors / scale  # in steps
    # It is rounding to a neighbour, with the probability that makes the mean right.
    position = ((x.double() - params.double().repeat_interleave(GROUP, 0)[:128, 1]) / scale) % 1
    variance = position * (1 - position)
    bias = 2**-17 + 2**-13  # of a 16-bit dither; of float32 arithmetic at 8 bits
    assert_within(errors.mean(0), torch.zeros(128), 4 * (variance / seeds).sqrt() + bias)
    assert abs(errors.mean()) < 4 * math.sqrt(variance.mean() / (seeds * 128)) + bias
    assert abs(errors.var(0).mean() - variance.mean()) < 0.02


@EVERY_BITS
def test_rounding_of_another_step_or_layer_is_independent(ops, bits):
    """Data that hardly differs, as from one step to the next, is rounded anew; so is data of
    another layer, and the same data under another seed."""
    x = torch.randn(6400)
    groups = x.clone().view(-1, GROUP)
    groups[:, 5] = torch.nextafter(groups[:, 5], torch.full((100,), math.inf))
    _, params = ops.quant_pack(x, bits, 0)
    scale, _ = per_element(params, 6400)

    def error(data, seed=0):
        return (round_trip(ops, data, bits, seed).double() - data) / scale

    for other in (error(groups.view(-1)), error(x, seed=1)):
        pair = torch.stack((error(x), other))
        # Independent errors have a correlation of 0, with a standard error of 1 / sqrt(6400).
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / math.sqrt(6400)


@EVERY_BITS
def test_other_seeds_and_other_data_draw_other_dither(ops, bits):
    x = torch.randn(6400)
    codes, _ = ops.quant_pack(x, bits, 0)
    again, _ = ops.quant_pack(x.clone(), bits, 0)
    assert_same(codes, again)
    assert not torch.equal(codes, ops.quant_pack(x, bits, 1)[0])
    assert not torch.equal(codes, ops.quant_pack(x, bits, 2**40)[0])
    assert not torch.equal(codes, ops.quant_pack(x, bits, -5)[0])


def test_dither_is_uniform_inside_zero_and_one_and_uncorrelated():
    groups = torch.randn(2000, GROUP)
    u = dither(groups, 7)
    assert u.shape == groups.shape
    assert u.min() > 0 and u.max() < 1
    n = u.numel()
    assert abs(u.mean() - 0.5) < 6 / math.sqrt(12 * n)
    histogram = torch.histc(u, 16, 0, 1)
    expected = n / 16
    assert ((histogram - expected).abs() < 6 * math.sqrt(expected)).all()
    centred = (u - 0.5) * math.sqrt(12)
    correlation = centred.T @ centred / 2000 - torch.eye(GROUP)
    assert correlation.abs().max() < 6 / math.sqrt(2000)
    assert (centred[1:] * centred[:-1]).mean().abs() < 6 / math.sqrt(n)


def test_equal_groups_draw_different_dither():
    """The same data twice in one tensor is not rounded in the same way."""
    u = dither(torch.randn(1, GROUP).expand(100, GROUP).contiguous(), 0)
    assert len({tuple(row.tolist()) for row in u}) == 100


@EVERY_BITS
def test_a_constant_that_bfloat16_holds_comes_back_exactly(ops, bits):
    for value in (0.0, -0.0, 1.0, -2.5, 3e38, 2.0**-126, 96.0):
        x = torch.full((100,), value).bfloat16().float()
        assert torch.equal(round_trip(ops, x, bits), x)


@EVERY_BITS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_with_anything_not_finite_reads_back_as_nan(ops, bits, bad):
    x = torch.randn(300)
    x[70] = bad
    dense = round_trip(ops, x, bits)
    assert dense[64:128].isnan().all()
    assert dense[:64].isfinite().all() and dense[128:].isfinite().all()
    x[299] = bad  # in the last, short group
    assert round_trip(ops, x, bits)[256:].isnan().all()


@EVERY_BITS
@pytest.mark.parametrize("ends", [(-3e38, 3e38), (3.39e38, 3.4e38), (-3.4e38, 0.0), (0.0, 3.4e38)])
def test_the_largest_numbers_read_back_close_or_not_finite(ops, bits, ends):
    x = torch.linspace(0, 1, 64).double().mul(ends[1] - ends[0]).add(ends[0]).float()
    codes, params = ops.quant_pack(x, bits, 0)
    dense = ops.quant_unpack(codes, params, bits, [64], torch.float32)
    step = params.double()[0, 0]
    assert step.isfinite() or dense.isnan().all()
    finite = dense.isfinite()  # an end rounded outward may decode beyond float32
    assert_within(dense[finite], x[finite], step * (1 + 1e-5))
    assert (x[dense.isinf()].abs() > 3.3e38).all()


@EVERY_BITS
def test_the_smallest_numbers_are_within_the_smallest_step(ops, bits):
    x = torch.randn(640) * 1e-40
    assert_within(round_trip(ops, x, bits), x, 2.0**-126 * 1.01)


@EVERY_BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_packed_as_their_float32_values(ops, bits, dtype):
    x = torch.randn(9, 33, dtype=torch.float64).to(dtype)
    for a, b in zip(ops.quant_pack(x, bits, 2), ops.quant_pack(x.float(), bits, 2), strict=True):
        assert_same(a, b)
    assert_same(round_trip(ops, x, bits, dtype=dtype), round_trip(ops, x.float(), bits).to(dtype))
    codes = ops.quant_pack_range(x, bits, -1.0, 2.0, 2)
    assert_same(codes, ops.quant_pack_range(x.float(), bits, -1.0, 2.0, 2))


@EVERY_BITS
def test_inputs_of_any_layout(ops, bits):
    whole = torch.randn(30, 40, 7)
    views = whole.transpose(0, 2), whole[::2, 1::3], whole[:1].expand(5, 40, 7)
    image = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    for x in (*views, image):
        plain = x.contiguous()
        for a, b in zip(ops.quant_pack(x, bits, 0), ops.quant_pack(plain, bits, 0), strict=True):
            assert_same(a, b)
        codes = ops.quant_pack_range(x, bits, -1.0, 1.0, 0)
        assert_same(codes, ops.quant_pack_range(plain, bits, -1.0, 1.0, 0))


@EVERY_BITS
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 2)])
def test_empty(ops, bits, shape):
    x = torch.randn(shape)
    codes, params = ops.quant_pack(x, bits, 0)
    assert codes.shape == (0, 8 * bits) and params.shape == (0, 2)
    assert ops.quant_unpack(codes, params, bits, list(shape), torch.float32).shape == shape
    codes = ops.quant_pack_range(x, bits, 0.0, 1.0, 0)
    assert codes.shape == (0, 8 * bits)
    unpacked = ops.quant_unpack_range(codes, bits, 0.0, 1.0, list(shape), torch.float16)
    assert unpacked.shape == shape and unpacked.dtype == torch.float16


@EVERY_BITS
def test_nothing_uninitialised_comes_back(ops, bits, poison):
    for n in SIZES:
        x = torch.randn(n)
        codes, params = ops.quant_pack(x, bits, 0)
        assert params.isfinite().all()
        assert ops.quant_unpack(codes, params, bits, [n], torch.float32).isfinite().all()
        codes = ops.quant_pack_range(x, bits, -1.0, 1.0, 0)
        dense = ops.quant_unpack_range(codes, bits, -1.0, 1.0, [n], torch.float32)
        assert dense.abs().max() <= 1


# ------------------------------------------------------------------------------------ fixed range


@EVERY_BITS
@EVERY_SIZE
def test_fixed_range_is_within_one_step_of_the_clamped_value(ops, bits, n):
    lo, hi = -0.13, 1.13
    x = torch.randn(n)
    codes = ops.quant_pack_range(x, bits, lo, hi, 0)
    assert codes.shape == (-(-n // GROUP), 8 * bits)
    dense = ops.quant_unpack_range(codes, bits, lo, hi, [n], torch.float32)
    step = (hi - lo) / (2**bits - 2)
    assert_within(dense, x.clamp(lo, hi), step * (1 + 1e-5) + 1e-6)
    levels = torch.from_numpy(decode(codes, bits)).flatten()[:n]
    assert levels.max() <= 2**bits - 2
    assert_within(dense, levels * step + lo, 1e-6)


@EVERY_BITS
def test_fixed_range_levels_and_ends_come_back_exactly(ops, bits):
    lo, hi = -1.0, 1.0
    levels = torch.arange(2**bits - 1) * (hi - lo) / (2**bits - 2) + lo
    codes = ops.quant_pack_range(levels, bits, lo, hi, 0)
    stored = torch.from_numpy(decode(codes, bits)).flatten()[: len(levels)]
    assert stored.tolist() == list(range(2**bits - 1))
    beyond = torch.tensor([-math.inf, -5.0, lo, hi, 5.0, math.inf])
    codes = ops.quant_pack_range(beyond, bits, lo, hi, 0)
    dense = ops.quant_unpack_range(codes, bits, lo, hi, [6], torch.float32)
    assert_within(dense, torch.tensor([lo, lo, lo, hi, hi, hi]), 1e-6)


@EVERY_BITS
def test_fixed_range_mean_over_seeds_is_exact(ops, bits):
    lo, hi, seeds = -0.1, 1.1, 400
    x = torch.rand(640) * (hi - lo) + lo
    step = (hi - lo) / (2**bits - 2)
    draws = torch.stack(
        [
            ops.quant_unpack_range(
                ops.quant_pack_range(x, bits, lo, hi, seed), bits, lo, hi, [640], torch.float32
            )
            for seed in range(seeds)
        ]
    )
    errors = (draws.double() - x) / step
    bias = 2**-17 + 2**-13
    assert_within(errors.mean(0), torch.zeros(640), 6 * 0.5 / math.sqrt(seeds) + bias)
    assert abs(errors.mean()) < 6 * 0.5 / math.sqrt(seeds * 640) + bias


@EVERY_BITS
def test_fixed_range_has_a_code_for_nan(ops, bits):
    x = torch.rand(130)
    x[[5, 64, 129]] = math.nan
    codes = ops.quant_pack_range(x, bits, 0.0, 1.0, 0)
    dense = ops.quant_unpack_range(codes, bits, 0.0, 1.0, [130], torch.float32)
    assert dense.isnan().nonzero().flatten().tolist() == [5, 64, 129]
    integers = decode(codes, bits).flatten()
    assert set(integers[[5, 64, 129]]) == {2**bits - 1}


@EVERY_BITS
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_on_the_level_that_float64_says(ops, bits, name):
    for n, dtype in itertools.product((0, *SIZES), (torch.float32, torch.bfloat16)):
        x, lo, hi = (torch.randn(n) * 4).to(dtype), -0.13, 1.13
        x[5::40] = math.nan
        codes = ops.quant_pack_derivative(x, bits, name, lo, hi, n)
        assert_derivative_codes(codes, x, bits, name, lo, hi, n, 2e-6)  # torch's own in float32


@EVERY_BITS
def test_derivative_mean_over_seeds_is_exact(ops, bits):
    limits, seeds = (-0.13, 1.13), 400
    x, step = torch.randn(640) * 2, 1.26 / (2**bits - 2)
    draws = [
        ops.quant_unpack_range(
            ops.quant_pack_derivative(x, bits, "gelu", *limits, seed), bits, *limits, [640], x.dtype
        )
        for seed in range(seeds)
    ]
    wide = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.gelu(wide).sum(), wide)
    errors, bias = (torch.stack(draws).double() - slope) / step, 2**-17 + 2**-13
    assert_within(errors.mean(0), torch.zeros(640), 6 * 0.5 / math.sqrt(seeds) + bias)
    assert abs(errors.mean()) < 6 * 0.5 / math.sqrt(seeds * 640) + bias


# --------------------------------------------------------------------------------------- bfloat16


def test_bfloat16_rounding_has_a_direction():
    x = torch.cat(
        (
            torch.randn(1000) * torch.logspace(-40, 38, 1000),
            torch.tensor([0.0, -0.0, 1.0, -1.0, 3.39e38, -3.39e38, 1e-45, -1e-45]),
        )
    )
    down, up = bfloat16_down(x), bfloat16_up(x)
    assert (down <= x).all() and (up >= x).all()
    for rounded in (down, up):
        assert_same(rounded, rounded.bfloat16().float())  # it is a bfloat16 value
    held = x == x.bfloat16().float()
    assert torch.equal(down[held], x[held]) and torch.equal(up[held], x[held])
    between = torch.nextafter(down[~held].bfloat16(), torch.tensor(math.inf).bfloat16()).float()
    assert torch.equal(between, up[~held])  # neighbours, with x between them
