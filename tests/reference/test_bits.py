"""One bit an element: the layout, and what is done with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.helpers import assert_same

SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 256, 1000)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("n", SIZES)
def test_least_significant_bit_first_and_zeros_at_the_end(ops, n):
    mask = torch.rand(n) < 0.5
    expected = np.packbits(mask.numpy(), bitorder="little")
    assert_same(ops.bits_pack(mask), torch.from_numpy(expected))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", FLOATING)
def test_apply(ops, n, dtype):
    mask = torch.rand(n) < 0.5
    x = torch.randn(n).to(dtype)
    bits = ops.bits_pack(mask)
    assert_same(ops.bits_apply(x, bits, 1.0), torch.where(mask, x, torch.zeros_like(x)))
    scaled = ops.bits_apply(x, bits, 1.25)
    expected = torch.where(mask, x.double() * 1.25, 0.0)
    error = (scaled.double() - expected).abs()
    assert (error <= expected.abs() * torch.finfo(dtype).eps).all()


def test_what_is_masked_is_zero_even_where_it_is_not_finite(ops):
    x = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf])
    bits = ops.bits_pack(torch.tensor([False, False, False, True, True]))
    got = ops.bits_apply(x, bits, 2.0)
    assert got[:3].tolist() == [0, 0, 0] and got[3].isnan() and got[4] == math.inf


def test_any_shape_and_layout(ops):
    mask = torch.rand(6, 10, 4) < 0.3
    x = torch.randn(6, 10, 4)
    order = (2, 0, 1)
    view, x_view = mask.permute(order), x.permute(order)
    bits = ops.bits_pack(view)
    assert_same(bits, ops.bits_pack(view.contiguous()))
    got = ops.bits_apply(x_view, bits, 3.0)
    assert_same(got, torch.where(view, x_view * 3, 0.0))
    assert got.is_contiguous()
    expanded = torch.randn(1, 10, 4).expand(6, 10, 4)
    got = ops.bits_apply(expanded, ops.bits_pack(mask), 1.0)
    assert_same(got, torch.where(mask, expanded, 0.0))


def test_nothing_uninitialised_comes_back(ops, poison):
    for n in SIZES:
        mask = torch.rand(n) < 0.5
        assert ops.bits_apply(torch.randn(n), ops.bits_pack(mask), 1.0).isfinite().all()
        assert (np.unpackbits(ops.bits_pack(mask).numpy(), bitorder="little")[n:] == 0).all()
