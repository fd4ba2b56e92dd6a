"""Pooling, maxima and padding: what little is kept, exactly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from memtl import functional as M
from memtl.memory import saved_bytes
from memtl.storage import Quantized
from tests.helpers import assert_same, leaves, run


@pytest.mark.parametrize(
    ("kernel", "bits"), [(1, 2), ((1, 3), 2), (2, 3), ((3, 5), 4), (4, 8), (15, 8), (16, 32)]
)
def test_a_place_takes_as_many_bits_as_its_window_needs(kernel, bits):
    (x,) = leaves([torch.randn(2, 4, 32, 32)])
    y = M.max_pool2d(x, kernel, 1)
    kept = y.numel() * 4
    if bits < 32:
        kept = Quantized(bits, (0.0, 1.0)).nbytes(y.shape, y.dtype)
    assert saved_bytes(M.max_pool2d, x, kernel, 1) == kept


@pytest.mark.parametrize("size", [(3, 3), (16, 16), (17, 16), (200, 200)])
def test_adaptive_places_take_the_smallest_integer(size):
    (x,) = leaves([torch.randn(2, 3, *size)])
    width = 1 if math.prod(size) <= 256 else 2 if math.prod(size) <= 2**15 else 4
    assert saved_bytes(M.adaptive_max_pool2d, x, 2) == 2 * 3 * 4 * width


def test_averages_and_padding_keep_nothing():
    (x,) = leaves([torch.randn(2, 3, 8, 8)])
    assert saved_bytes(F.avg_pool2d, x, 2) == x.numel() * 4
    assert saved_bytes(M.avg_pool2d, x, 2) == 0
    assert saved_bytes(M.adaptive_avg_pool2d, x, 3) == 0
    assert saved_bytes(M.pad, x, (1, 1, 1, 1), "reflect") == 0


def test_equal_maxima_share_the_gradient():
    x = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [math.nan, 1.0, math.inf]])
    for ours, stock in ((M.amax, torch.amax), (M.amin, torch.amin)):
        out, (grad,), _ = run(lambda t, f=ours: f(t, 1), [x])
        expected, (stock_grad,), _ = run(lambda t, f=stock: f(t, 1), [x])
        assert_same(out, expected)
        assert_same(grad[:2], stock_grad[:2])


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
def test_ties_nan_and_infinities_pool_as_in_torch(ceil_mode, padding):
    x = torch.randint(0, 3, (2, 3, 11, 10)).float()
    x[0, 0, 2, 3], x[0, 1, 4, 4] = math.nan, math.inf
    x[1, 2] = -math.inf
    options = {"stride": 2, "padding": padding, "ceil_mode": ceil_mode}
    out, (grad,), _ = run(lambda t: M.max_pool2d(t, 3, **options), [x])
    expected, (stock,), _ = run(lambda t: F.max_pool2d(t, 3, **options), [x])
    assert_same(out, expected)
    assert_same(grad, stock)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("function", ["max_pool2d", "avg_pool2d"])
def test_other_layouts(function, layout):
    x = torch.randn(2, 5, 9, 8)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x.mT
    ours = run(lambda t: getattr(M, function)(t, 3, 2, 1), [x])
    stock = run(lambda t: getattr(F, function)(t, 3, 2, 1), [x])
    assert_same(ours[0], stock[0])
    assert ours[0].stride() == stock[0].stride()
    torch.testing.assert_close(ours[1][0], stock[1][0])


def test_spatial_dimensions_of_size_zero_are_torchs_errors_or_results():
    x = torch.randn(2, 3, 0, 4, requires_grad=True)
    for function in (M.max_pool2d, F.max_pool2d):
        with pytest.raises(RuntimeError):
            function(x, 2)
    for pool in (M.adaptive_avg_pool2d, F.adaptive_avg_pool2d):
        with pytest.raises(RuntimeError):
            pool(x, (2, 2))
