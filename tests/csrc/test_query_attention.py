"""query_attention in C++ against its definition in float64, in every instruction set."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import memtl  # noqa: F401  (defines and registers the operators)
from memtl import reference
from memtl._ops import FLOATING
from tests.helpers import assert_within, gamma, unit

ops = torch.ops.memtl
# batch, heads, queries, keys, d, e: odd ones, more than a block of keys (512 of 64 and 64), more
# queries than a call takes, and none of anything.
SHAPES = [
    (2, 3, 1, 197, 64, 64),
    (1, 2, 3, 7, 5, 3),
    (2, 1, 2, 1, 8, 16),
    (1, 1, 70, 130, 17, 33),
    (1, 2, 3, 1500, 64, 64),
    (1, 1, 2, 1000, 80, 96),
    (3, 2, 33, 600, 64, 31),
    (2, 2, 5, 0, 4, 4),
    (1, 1, 0, 5, 4, 4),
    (0, 1, 2, 5, 4, 4),
    (1, 1, 3, 5, 0, 4),
    (1, 1, 3, 5, 4, 0),
]


def operands(batch, heads, t, n, d, e, dtype):
    """Keys and values with a mean, as a ViT's have."""
    size = (batch, heads)
    return (
        torch.randn(*size, t, d).to(dtype),
        (torch.randn(*size, n, d) + 2).to(dtype),
        (torch.randn(*size, n, e) - 3).to(dtype),
        torch.randn(*size, t, e).to(dtype),
    )


def drawn_mask(batch, heads, n, dtype=torch.float32):
    mask = torch.randn(batch, heads, n).to(dtype)
    return mask.masked_fill(torch.rand(batch, heads, n) < 0.3, -math.inf)


def exact(q, k, v, g, mask, scale):
    """out, J and dq in float64, and what each may be off by, a rounding to its dtype left out."""
    q, k, v, g = (x.double() for x in (q, k, v, g))
    mask = None if mask is None else mask.double()
    out, j = reference.query_attention(q, k, v, mask, scale, torch.float64)
    dq = reference.query_attention_grad(g, q, k, v, mask, scale)
    if k.shape[2] == 0:
        return (out, j, dq), (out, j, dq)
    d, n, e = k.shape[3], k.shape[2], v.shape[3]
    # A score's error, in the exponent of its probability; the mask is a few units, or -inf.
    scores = (scale * q).abs() @ k.abs().mT + 8
    off = 2 * gamma(d + 8) * scores.amax(-1) + gamma(n + 20)
    p = reference.query_attention(q, k, torch.eye(n).double(), mask, scale, None)[0]
    keys, values = p @ k.abs(), p @ v.abs()
    slopes = g.abs() @ v.abs().mT
    spread = slopes + (p * slopes).sum(-1, keepdim=True)
    far = v.abs()[:, :, None] + values[:, :, :, None] + v.abs().mean(2)[:, :, None, None]
    near = k.abs()[:, :, None] + keys[:, :, :, None]
    bounds = (
        off[..., None] * values,
        2 * scale * off[..., None, None] * torch.einsum("bhtn,bhtnd,bhtne->bhtde", p, near, far),
        2 * scale * (off + gamma(e + 4))[..., None] * ((p * spread) @ k.abs()),
    )
    return (out, j, dq), bounds


def check(q, k, v, g, mask, scale, jacobian):
    out, j = ops.query_attention(q, k, v, mask, scale, jacobian)
    dq = ops.query_attention_grad(g, q, k, v, mask, scale)
    assert (out.dtype, j.dtype, dq.dtype) == (q.dtype, jacobian, q.dtype)
    assert torch.equal(out, ops.query_attention(q, k, v, mask, scale, None)[0])
    shrink = unit(torch.float64) / unit(torch.float32) if q.dtype == torch.float64 else 1
    for found, wanted, bound in zip((out, j, dq), *exact(q, k, v, g, mask, scale), strict=True):
        # Of float16 the smallest step is 6e-8.
        rounding = unit(found.dtype) * wanted.abs() + 6e-8 * (found.dtype == torch.float16)
        assert found.is_contiguous()
        assert_within(found, wanted, shrink * bound + 1.01 * rounding)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(isa, shape, dtype):
    batch, heads, _, n, d, _ = shape
    scale = 1 / math.sqrt(max(1, d))
    q, k, v, g = operands(*shape, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    check(q, k, v, g, None, scale, wide)
    for size in ((batch, heads), (1, heads), (batch, 1), (1, 1)):
        check(q, k, v, g, drawn_mask(*size, n), scale, wide)
    check(q[:1], k, v, g, drawn_mask(batch, 1, n, dtype), scale, wide)


@pytest.mark.parametrize("jacobian", FLOATING)
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_dtypes_of_the_jacobian(isa, shape, jacobian):
    for dtype in (torch.float32, torch.float64):
        q, k, v, g = operands(*shape, dtype)
        # A float16 or bfloat16 J is rounded once more, from float32.
        j = ops.query_attention(q, k, v, None, 0.1, jacobian)[1]
        wide = ops.query_attention(q, k, v, None, 0.1, dtype)[1]
        if dtype == torch.float64 and jacobian != torch.float64:
            wide = wide.float()
        assert torch.equal(j, wide.to(jacobian))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strided_operands_are_read_as_they_are(isa, dtype):
    for n, d in ((50, 64), (9, 12)):
        qkv = torch.randn(2, n, 3, 4, d).to(dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        views = [
            (q[:, :, :3], k, v),
            (q[:, :, 3:4], k[:, :, 1:], v[:, :, 1:]),
            (q[:1, :, ::2], k[:, :, ::3], v[:, :, ::3]),
            (q[:, :, :2, ::2], k[..., ::2], v),
            (q[:, :, :2], k, v.mT.contiguous().mT),
            (q[:, :, :2], k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 4, -1, -1)),
        ]
        for view in views:
            mask = drawn_mask(4, 2, view[1].shape[2] + 1).transpose(0, 1)[:, :, 1:]
            g = torch.randn(2, view[2].shape[3], view[0].shape[2], 4).to(dtype).permute(0, 3, 2, 1)
            copies = [x.contiguous() for x in (*view, mask)]
            found = ops.query_attention(*view, mask, 0.2, torch.float32)
            for a, b in zip(found, ops.query_attention(*copies, 0.2, torch.float32), strict=True):
                assert torch.equal(a, b)
            found = ops.query_attention_grad(g, *view, mask, 0.2)
            assert torch.equal(found, ops.query_attention_grad(g.contiguous(), *copies, 0.2))


def test_queries_without_keys(isa):
    for n in (0, 5, 700):
        q, k, v, g = operands(2, 2, 3, n, 64, 64, torch.float32)
        mask = torch.zeros(2, 1, n)
        mask[0] = -math.inf
        out, j = ops.query_attention(q, k, v, mask, 1.0, torch.float32)
        dq = ops.query_attention_grad(g, q, k, v, mask, 1.0)
        for found in (out, j, dq):
            assert (found[0] == 0).all()
            assert n == 0 or found[1].abs().sum() > 0


@pytest.mark.parametrize("n", [3, 100, 1100])
def test_keys_left_out_are_as_if_not_there(isa, n):
    q, k, v, g = operands(1, 2, 3, n, 16, 8, torch.float32)
    for keep in (slice(0, 1), slice(n // 2, n), slice(n - 1, n)):
        mask = torch.full((1, 1, n), -math.inf)
        mask[..., keep] = 0
        few = (q, k[:, :, keep], v[:, :, keep], None, 0.3)
        found = *ops.query_attention(q, k, v, mask, 0.3, torch.float32), None
        found = *found[:2], ops.query_attention_grad(g, q, k, v, mask, 0.3)
        wanted = *ops.query_attention(*few, torch.float32), ops.query_attention_grad(g, *few)
        for a, b in zip(found, wanted, strict=True):
            assert_within(a, b, 1e-4)


def test_huge_scores(isa):
    """The softmax is then of one key: out is its value, and the gradient nothing."""
    for n, big in itertools.product((7, 1100), (1e4, 1e18)):
        q, k, v, g = operands(1, 1, 2, n, 16, 16, torch.float32)
        q, k = q.abs() * big, -k.abs() * 4
        k[:, :, n // 2] = 1
        out, j = ops.query_attention(q, k, v, None, 1.0, torch.float32)
        assert torch.equal(out, v[:, :, n // 2 : n // 2 + 1].expand(-1, -1, 2, -1))
        assert (j == 0).all()
        assert (ops.query_attention_grad(g, q, k, v, None, 1.0) == 0).all()


def test_what_does_not_overflow_in_the_definition_does_not_here(isa):
    v = torch.full((1, 1, 50, 16), 3e38)
    q, k, g = torch.zeros(1, 1, 1, 16), torch.randn(1, 1, 50, 16), torch.zeros(1, 1, 1, 16)
    assert_within(ops.query_attention(q, k, v, None, 1.0, None)[0], v[:, :, :1], 3e38 * 1e-5)
    assert (ops.query_attention_grad(g, q, k, v, None, 1.0) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATING)
def test_what_is_not_finite(isa, bad, dtype):
    """In kind what the definition gives: not finite in the same places, NaN where it has NaN."""
    for which, n in itertools.product(range(5), (9, 40)):
        q, k, v, g = operands(1, 2, 2, n, 16, 16, dtype)
        mask = torch.zeros(1, 1, n)
        if which == 4:
            mask[..., 5] = bad
        else:
            (q, k, v, g)[which][0, 1, 1, 3] = bad
        arguments = (q, k, v, mask, 0.2)
        found = (
            *ops.query_attention(*arguments, torch.float32),
            ops.query_attention_grad(g, *arguments),
        )
        wanted = (
            *reference.query_attention(*arguments, torch.float32),
            reference.query_attention_grad(g, *arguments),
        )
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
            assert a[b.isnan()].isnan().all() or a.dim() == 5


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("n", [197, 1500])
def test_no_less_accurate_than_autograd(isa, mean, n):
    """Through the plain formula in float32, relative to the largest entry."""
    q, k, v, g = operands(2, 3, 2, n, 64, 64, torch.float32)
    k, v = k + mean, v - mean
    wanted_j = reference.query_attention(
        q.double(), k.double(), v.double(), None, 0.1, torch.double
    )[1]
    wanted = (wanted_j @ g.double()[..., None])[..., 0]
    leaf = q.clone().requires_grad_()
    F.softmax(leaf @ k.mT * 0.1, -1).matmul(v).backward(g)
    j = ops.query_attention(q, k, v, None, 0.1, torch.float32)[1]
    ours = (j.double() @ g.double()[..., None])[..., 0]
    again = ops.query_attention_grad(g, q, k, v, None, 0.1)
    plain = (leaf.grad - wanted).abs().max()
    for found in (ours, again):
        assert (found - wanted).abs().max() <= 2 * plain + 1e-6 * wanted.abs().max()


def test_values_may_have_any_mean(isa):
    """J is a covariance: what is added to all values, here without rounding, leaves it as it is."""
    q, k, v, _ = operands(1, 2, 3, 300, 32, 48, torch.float32)
    v = (v * 256).round() / 256
    j, shifted = (ops.query_attention(q, k, x, None, 0.2, torch.float32)[1] for x in (v, v + 1024))
    assert_within(shifted, j, 1e-5 * j.abs().max())


def test_threads_share_the_queries_of_one_head(isa):
    q, k, v, g = operands(1, 1, 37, 70, 64, 64, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    *ops.query_attention(q, k, v, None, 0.1, torch.float32),
                    ops.query_attention_grad(g, q, k, v, None, 0.1),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        # How queries are cut decides which of two ways their scores are summed up.
        assert_within(a, b, 1e-5 * b.abs().max())


def test_errors_name_the_tensor():
    pytest.importorskip("memtl._C")
    q, k, v, g = operands(2, 2, 3, 5, 8, 4, torch.float32)
    call, grad = ops.query_attention, ops.query_attention_grad
    shapes = r"query_attention: expected q \[B or 1, H, T, d\], k \[B, H, N, d\], v \[B, H, N, e\]"
    for bad in ((q[0], k, v), (q[:, :1], k, v), (q, k[..., :4], v), (q, k, v[:, :, 1:])):
        with pytest.raises(RuntimeError, match=shapes):
            call(*bad, None, 1.0, None)
    with pytest.raises(RuntimeError, match="expected q, k, v of one dtype, got Float"):
        call(q, k.double(), v, None, 1.0, None)
    with pytest.raises(RuntimeError, match="expected q in float32, .*, got Long"):
        call(q.long(), k.long(), v.long(), None, 1.0, None)
    with pytest.raises(RuntimeError, match="expected jacobian in float32, .*, got Long"):
        call(q, k, v, None, 1.0, torch.int64)
    with pytest.raises(RuntimeError, match="expected mask in float32, .*, got Bool"):
        call(q, k, v, torch.ones(1, 1, 5).bool(), 1.0, None)
    with pytest.raises(RuntimeError, match=r"expected mask \[B or 1, H or 1, N\] for k .*5, 8\]"):
        call(q, k, v, torch.ones(1, 1, 4), 1.0, None)
    for bad in (g[:1], g.double(), g[..., 1:]):
        with pytest.raises(RuntimeError, match=r"expected grad_out \[B, H, T, e\] in the dtype"):
            grad(bad, q, k, v, None, 1.0)
