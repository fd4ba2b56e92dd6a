"""Queries that train over frozen keys and values: exact in both ways to keep, bytes by formula."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from memtl import functional as M
from memtl.memory import saved_bytes
from tests.helpers import assert_same, assert_within, grad_like, unit

KEEPS = ("jacobian", "kv", "auto")
EVERY = pytest.mark.parametrize("keep", KEEPS)


def operands(batch=2, heads=3, t=2, n=30, d=8, e=8, shared=False, dtype=torch.float32):
    q = torch.randn(1 if shared else batch, heads, t, d).to(dtype).requires_grad_()
    return q, *(torch.randn(batch, heads, n, size).to(dtype) for size in (d, e))


def grads(fn, q, *rest, **options):
    out = fn(q, *rest, **options)
    return out.detach(), torch.autograd.grad(out, q, grad_like(out))[0]


def stock(q, k, v, *rest, **options):
    return F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v, *rest, **options)


@EVERY
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float", "float64"])
@pytest.mark.parametrize("n", [1, 197])
def test_torchs_attention_up_to_rounding(keep, shared, mask, n):
    q, k, v = operands(n=n, d=16, e=12, shared=shared)
    given = None
    if mask is not None:
        given = torch.rand(2, 1, 1, n) < 0.7
        given[..., 0] = True
    if mask in ("float", "float64"):
        given = torch.randn(2, 3, 1, n).masked_fill(~given, -math.inf)
    ours = given if mask != "float64" else given.double()
    out, grad = grads(M.query_attention, q, k, v, ours, keep=keep)
    expected, expected_grad = grads(stock, q, k, v, given)
    assert_within(out, expected, 1e-5)
    assert grad.shape == q.shape and grad.dtype == q.dtype
    # One key has no gradient: what torch gives there is rounding alone.
    assert_within(grad, expected_grad, 1e-5 * expected_grad.abs().max() + 1e-6 * (n == 1))


@EVERY
def test_scale_and_every_dtype(keep):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        q, k, v = operands(dtype=dtype)
        out, grad = grads(M.query_attention, q, k, v, scale=0.9, keep=keep)
        wide = [x.detach().double() for x in (q, k, v)]
        wide[0].requires_grad_()
        expected, expected_grad = grads(stock, *wide, scale=0.9)
        bound = 2 * unit(dtype) if dtype != torch.float64 else 1e-12
        assert out.dtype == grad.dtype == dtype
        assert_within(out, expected, bound * (1 + expected.abs()))
        # grad_out is rounded to the dtype as well.
        assert_within(grad, expected_grad, 4 * bound * expected_grad.abs().max() + bound)


@EVERY
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(keep, shared):
    q, k, v = operands(n=5, d=3, e=4, shared=shared, dtype=torch.float64)
    mask = torch.randn(2, 1, 1, 5, dtype=torch.float64)
    assert gradcheck(lambda q: M.query_attention(q, k, v, mask, keep=keep), (q,))


def test_saved_bytes():
    for dtype, t in ((torch.float32, 2), (torch.bfloat16, 3), (torch.float64, 1)):
        q, k, v = operands(t=t, e=4, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        jacobian = 2 * 3 * t * 8 * 4 * wide.itemsize
        kept = 2 * 3 * (t * 8 + 30 * 8 + 30 * 4) * dtype.itemsize
        assert saved_bytes(M.query_attention, q, k, v, keep="jacobian") == jacobian
        half = {"keep": "jacobian", "jacobian_dtype": torch.bfloat16}
        assert saved_bytes(M.query_attention, q, k, v, **half) == jacobian * 2 // wide.itemsize
        assert saved_bytes(M.query_attention, q, k, v, keep="kv") == kept
        auto = saved_bytes(M.query_attention, q, k, v)
        assert auto == min(jacobian, kept)
        mask = torch.zeros(2, 1, 1, 30)
        assert saved_bytes(M.query_attention, q, k, v, mask, keep="kv") == kept + 2 * 30 * 4
        assert saved_bytes(M.query_attention, q, k, v, mask, keep="jacobian") == jacobian
        assert saved_bytes(M.query_attention, q.detach(), k, v) == 0
        with torch.no_grad():
            assert saved_bytes(M.query_attention, q, k, v) == 0


def test_auto_takes_the_jacobian_up_to_about_2_n_over_d_queries():
    n, d = 32, 8  # T d d against 2 N d + T d: T = 2 N / (d - 1), where queries count as well
    for t in (1, 2 * n // d, 9, 10, 20):
        q, k, v = operands(t=t, n=n, d=d, e=d)
        jacobian, kept = 2 * 3 * t * d * d * 4, 2 * 3 * (t * d + 2 * n * d) * 4
        assert (jacobian <= kept) == (t <= 9)
        assert saved_bytes(M.query_attention, q, k, v) == min(jacobian, kept)


@EVERY
@pytest.mark.parametrize("apart", [False, True], ids=["interleaved", "one behind another"])
def test_a_view_keeps_no_qkv_alive(keep, apart):
    qkv = torch.randn(3, 2, 3, 30, 8) if apart else torch.randn(2, 30, 3, 3, 8)
    k, v = (qkv if apart else qkv.permute(2, 0, 3, 1, 4))[1:]
    q = torch.randn(2, 3, 2, 8, requires_grad=True)
    expected = grads(stock, q, k, v)[1]
    out = M.query_attention(q, k, v, keep=keep)
    alive = weakref.ref(qkv.untyped_storage())
    assert saved_bytes(M.query_attention, q, k, v, keep=keep) < qkv.nbytes
    del qkv, k, v
    gc.collect()
    assert alive() is None
    grad = torch.autograd.grad(out, q, grad_like(out))[0]
    assert_within(grad, expected, 1e-5 * expected.abs().max())


def test_a_bfloat16_jacobian_is_off_by_its_rounding():
    q, k, v = operands(n=100, d=32, e=32)
    out, exact = grads(M.query_attention, q, k, v, keep="jacobian")
    _, grad = grads(M.query_attention, q, k, v, keep="jacobian", jacobian_dtype=torch.bfloat16)
    j = torch.ops.memtl.query_attention(q, k, v, None, 32**-0.5, torch.float32)[1]
    bound = unit(torch.bfloat16) * (j.abs() @ grad_like(out).abs()[..., None])[..., 0]
    assert_within(grad, exact, 1.001 * bound)
    assert not torch.equal(grad, exact)


@EVERY
def test_autocast(keep):
    q, k, v = operands()
    with torch.autocast("cpu", torch.bfloat16):
        out, grad = grads(M.query_attention, q, k, v, keep=keep)
        expected, expected_grad = grads(stock, q, k, v)
    assert out.dtype == expected.dtype == torch.bfloat16 and grad.dtype == torch.float32
    assert_within(out, expected, 2**-6)
    assert_within(grad, expected_grad, 2**-5 * expected_grad.abs().max())


@EVERY
@pytest.mark.parametrize("shared", [False, True])
def test_compiled_as_one_graph_equals_eager(keep, shared):
    torch._dynamo.reset()
    q, k, v = operands(shared=shared)
    mask = torch.rand(2, 1, 1, 30) < 0.8
    fn = torch.compile(M.query_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        grads(fn, q, k, v, mask, keep=keep),
        grads(M.query_attention, q, k, v, mask, keep=keep),
        strict=True,
    ):
        assert_same(a, b)


@EVERY
def test_checkpointing_and_accumulation(keep):
    q, k, v = operands()
    out, grad = grads(M.query_attention, q, k, v, keep=keep)

    def checkpointed(*tensors):
        return checkpoint(M.query_attention, *tensors, use_reentrant=False, keep=keep)

    assert_same(grads(checkpointed, q, k, v)[1], grad)
    for times in (1, 2):
        M.query_attention(q, k, v, keep=keep).backward(grad_like(out))
        assert_same(q.grad, times * grad)


@EVERY
def test_double_backward_is_refused(keep):
    q, k, v = operands()
    out = M.query_attention(q, k, v, keep=keep)
    (grad,) = torch.autograd.grad(out, q, grad_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@EVERY
def test_a_query_without_keys(keep):
    q, k, v = operands()
    mask = torch.ones(2, 1, 1, 30).bool()
    mask[1] = False
    out, grad = grads(M.query_attention, q, k, v, mask, keep=keep)
    assert not out[1].any() and not grad[1].any()
    assert out[0].all() and grad[0].all()


@EVERY
@pytest.mark.parametrize("sizes", [(0, 2, 1, 5), (2, 2, 0, 5), (2, 2, 3, 0)])
def test_nothing_to_attend(keep, sizes):
    q, k, v = operands(*sizes)
    out, grad = grads(M.query_attention, q, k, v, keep=keep)
    assert out.shape == (*q.shape[:3], 8) and grad.shape == q.shape
    assert not out.any() and not grad.any()


def test_changed_in_place_is_noticed():
    q, k, v = operands()
    out = M.query_attention(q, k, v, keep="kv")
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    M.query_attention(q, copy.copy(k), v, keep="jacobian").sum().backward()


@pytest.mark.parametrize("which", ["key", "value", "mask"])
def test_there_is_no_gradient_of_keys_values_and_masks(which):
    q, k, v = operands()
    tensors = {"key": k, "value": v, "mask": torch.zeros(2, 1, 1, 30)}
    tensors[which].requires_grad_()
    arguments = (q, *tensors.values())
    with pytest.raises(NotImplementedError, match=r"key, value and mask get no gradient.*detach"):
        M.query_attention(*arguments)
    with torch.no_grad():
        assert M.query_attention(*arguments).shape == q.shape


def test_bad_arguments_are_named():
    q, k, v = operands()
    shapes = r"query_attention: expected query \[B or 1, H, T, d\], key \[B, H, N, d\] and value"
    for bad in ((q[0], k, v), (q[:, :2], k, v), (q, k[..., :4], v), (q, k, v[:, :, 1:])):
        with pytest.raises(ValueError, match=shapes):
            M.query_attention(*bad)
    with pytest.raises(TypeError, match=r"of one dtype, got torch\.float32, torch\.float64"):
        M.query_attention(q, k.double(), v)
    for i, name in enumerate(("query", "key", "value")):
        for bad, got in (
            (torch.ones(2).long(), "int64"),
            ([1.0], "list"),
            (k.to_sparse(), "sparse"),
        ):
            given = [bad if j == i else x for j, x in enumerate((q, k, v))]
            with pytest.raises(TypeError, match=f"query_attention: {name} must be .*{got}"):
                M.query_attention(*given)
    with pytest.raises(
        ValueError, match=r"keep must be one of \('auto', 'jacobian', 'kv'\), got 'v'"
    ):
        M.query_attention(q, k, v, keep="v")
    for bad in (torch.int8, "bfloat16"):
        with pytest.raises(TypeError, match="jacobian_dtype must be a floating-point dtype, got"):
            M.query_attention(q, k, v, jacobian_dtype=bad)
    for bad in (torch.ones(30).long(), "causal"):
        with pytest.raises(TypeError, match="attn_mask must be a bool or floating-point tensor"):
            M.query_attention(q, k, v, bad)
    for size in ((2, 3, 2, 30), (29,), (3, 1, 1, 30), (2, 2, 1, 30), (1, 2, 3, 1, 30)):
        with pytest.raises(
            ValueError, match=r"broadcasts to \[2, 3, 1, 30\] for key \[2, 3, 30, 8\]"
        ):
            M.query_attention(q, k, v, torch.zeros(size))
