"""query_attention's definition: float64 autograd through the plain formula, and what J is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from memtl import reference
from tests.helpers import assert_within

SHAPES = ((2, 3, 1, 50, 8, 5), (1, 2, 4, 1, 3, 3), (3, 1, 2, 7, 1, 4))


def operands(batch, heads, t, n, d, e):
    size = (batch, heads)
    shapes = ((t, d), (n, d), (n, e), (t, e))
    return [torch.randn(*size, *shape, dtype=torch.float64) for shape in shapes]


def by_autograd(q, k, v, mask, scale):
    """out [B, H, T, e], and its derivatives in q [B, H, T, d, e]."""
    q = q.expand(len(k), -1, -1, -1).clone().requires_grad_()
    scores = q @ k.mT * scale + (0 if mask is None else mask[:, :, None])
    out = F.softmax(scores, -1) @ v
    columns = (
        torch.autograd.grad(out[..., j].sum(), q, retain_graph=True)[0] for j in range(v.shape[3])
    )
    return out.detach(), torch.stack(list(columns), -1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_autograd_through_the_plain_formula(shape):
    q, k, v, g = operands(*shape)
    mask = torch.randn(shape[0], 1, shape[3], dtype=torch.float64)
    mask[..., 1::3] = -math.inf
    for given, queries in itertools.product((None, mask), (q, q[:1])):
        out, j = reference.query_attention(queries, k, v, given, 0.7, torch.float64)
        expected_out, expected_j = by_autograd(queries, k, v, given, 0.7)
        assert_within(out, expected_out, 1e-13)
        assert_within(j, expected_j, 1e-12)
        grad = reference.query_attention_grad(g, queries, k, v, given, 0.7)
        assert_within(grad, (expected_j @ g[..., None])[..., 0], 1e-12)


def test_the_jacobian_is_a_covariance():
    q, k, v, _ = operands(2, 2, 3, 20, 6, 4)
    j = reference.query_attention(q, k, v, None, 0.7, torch.float64)[1]
    shifted = reference.query_attention(q, k + 5, v - 100, None, 0.7, torch.float64)[1]
    assert_within(shifted, j, 1e-11)
    constant = torch.ones_like(v)
    assert (
        reference.query_attention(q, k, constant, None, 0.7, torch.float64)[1].abs() < 1e-13
    ).all()


@pytest.mark.parametrize("n", [0, 6])
def test_a_query_without_keys_reads_zeros(n):
    q, k, v, g = operands(2, 1, 3, n, 4, 5)
    mask = torch.full((1, 1, n), -math.inf)
    out, j = reference.query_attention(q, k, v, mask, 1.0, torch.float32)
    grad = reference.query_attention_grad(g, q, k, v, mask, 1.0)
    assert j.dtype == torch.float32
    assert not out.any() and not j.any() and not grad.any()


def test_dtypes_and_finite_values():
    for dtype, size in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1, 100)):
        q, k, v, g = (size * x.to(dtype) for x in operands(2, 3, 2, 30, 8, 8))
        out, j = reference.query_attention(q, k, v, None, 1.0, torch.float32)
        none = reference.query_attention(q, k, v, None, 1.0, None)[1]
        grad = reference.query_attention_grad(g, q, k, v, None, 1.0)
        assert out.dtype == grad.dtype == dtype and j.dtype == torch.float32
        assert none.shape == (0,) and none.dtype == dtype
        assert out.isfinite().all() and j.isfinite().all()
        assert grad.isfinite().all() or dtype == torch.float16  # 65504 is its largest number
