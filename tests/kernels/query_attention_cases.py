"""query_attention and its gradient: operands, and what they may be off by. The interpreter's tests
and those on a GPU share this.
"""

import itertools
import math

import torch

from memtl import reference
from tests.helpers import assert_within, gamma, unit

forward, backward = torch.ops.memtl.query_attention, torch.ops.memtl.query_attention_grad

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# batch, heads, queries, keys, d, e: whole tiles, parts of tiles, several tiles, nothing.
SIZES = (
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 37, 8, 8),
    (1, 2, 17, 33, 20, 24),
    (2, 1, 2, 16, 64, 64),
    (1, 1, 2, 19, 80, 100),
    (1, 2, 2, 0, 8, 5),
    (0, 2, 2, 5, 8, 8),
    (2, 0, 2, 5, 8, 8),
    (2, 2, 0, 5, 8, 8),
    (1, 1, 2, 5, 0, 4),
    (1, 1, 2, 5, 4, 0),
)


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(size, dtype=torch.float32, shared=False):
    """grad_out, q, k, v."""
    batch, heads, t, n, d, e = size
    q = draw(1 if shared else batch, heads, t, d, seed=1)
    k, v = draw(batch, heads, n, d, seed=2), draw(batch, heads, n, e, seed=3)
    return [x.to(dtype) for x in (draw(batch, heads, t, e), q, k, v)]


def masks(size):
    """Additive masks of every shape that broadcasts, with keys left out; at last, all of them."""
    batch, heads, _, n = size[:4]
    for b, h in itertools.product({1, batch}, {1, heads}):
        mask = draw(b, h, n, seed=4)
        yield mask.masked_fill(mask > 0.5, -math.inf)
    yield torch.full((batch, heads, n), -math.inf, dtype=torch.float64)
    if batch:
        mask = torch.zeros(batch, heads, n, dtype=torch.float64)
        mask[0] = -math.inf  # of one sample; of the others the first 20
        mask[1:, :, :20] = -math.inf
        yield mask


def wide(t):
    return t if t is None else t.double()


def largest(t):
    return t.abs().max().item() if t.numel() else 0.0


def spread(t, rounding):
    """The largest after centering, whose means are rounded."""
    return largest(t - t.mean(2, keepdim=True)) + rounding * largest(t)


def compare(grad_out, q, k, v, mask, scale, jacobian=None, ops=(forward, backward)):
    """Both operators against their definition in float64.

    A score errs by gamma(d) of its magnitudes and exp adds as much; weights err by that times two,
    products of two weights and what is centered on their mean by that times two again; a sum adds
    gamma of its terms. What is rounded last may be truncated (see interpreted_bits.py).
    """
    forward, backward = ops
    compute = torch.promote_types(q.dtype, torch.float32)
    wide_grad, wide_q, wide_k, wide_v, wide_mask = map(wide, (grad_out, q, k, v, mask))
    scores = abs(scale) * largest(wide_q.abs() @ wide_k.abs().mT)
    terms = sum(t.shape[-1] for t in (q, v)) + k.shape[2] + 16
    relative = 4 * gamma(terms, compute) * (1 + scores)

    def check(actual, expected, dtype, size):
        assert actual.dtype == dtype and actual.is_contiguous()
        stored = 2 * unit(dtype) * expected.abs() + torch.finfo(dtype).smallest_normal
        assert_within(actual.cpu(), expected, relative * size + stored)

    exact = wide_q, wide_k, wide_v, wide_mask, scale
    out, j = reference.query_attention(*exact, torch.float64)
    actual, empty = forward(q, k, v, mask, scale, None)
    assert empty.shape == (0,)
    check(actual, out, q.dtype, largest(wide_v))
    for dtype in () if jacobian is None else (jacobian,):
        actual = forward(q, k, v, mask, scale, dtype)
        check(actual[0], out, q.dtype, largest(wide_v))
        size = abs(scale) * 4 * spread(wide_k, relative) * spread(wide_v, relative)
        check(actual[1], j, dtype, size)
    grad = reference.query_attention_grad(wide_grad, *exact)
    size = abs(scale) * largest(wide_k) * largest(wide_grad.abs() @ wide_v.abs().mT)
    check(backward(grad_out, q, k, v, mask, scale), grad, q.dtype, 2 * size)
