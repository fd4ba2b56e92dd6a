"""attention_grad in Triton's interpreter; test_interpreter.py runs this file."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

import memtl
from memtl import reference
from tests.helpers import assert_within, unit

attention = importlib.import_module("memtl.kernels.attention")  # not the launcher
op = torch.ops.memtl.attention_grad


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(size, dtype=torch.float32):
    """grad_out, q, k, v for batch, heads, queries, keys, d, e."""
    batch, heads, m, n, d, e = size
    shapes = ((m, e), (m, d), (n, d), (n, e))
    return [draw(batch, heads, *s, seed=i).to(dtype) for i, s in enumerate(shapes)]


def run(grad_out, q, k, v, is_causal=False, scale=None):
    return op(grad_out, q, k, v, None, 0.0, None, is_causal, scale, False, False)


@pytest.fixture
def left(monkeypatch):
    """A list that grows with every call which is left to torch's own attention."""
    calls = []

    def run_again(*arguments):
        calls.append(arguments)
        return reference.attention_grad(*arguments)

    monkeypatch.setattr(attention, "run_again", run_again)
    return calls


def compare(grad_out, q, k, v, is_causal=False, scale=None):
    """With the definition in float64.

    p and ds = p (g - delta) are rounded to the operands' dtype for their products, which then add
    up numbers that are off by it; g and delta are no larger than ``largest``. float32 adds what
    scores and sums err by. What is rounded last may be truncated (see interpreted_bits.py), and so
    may p and ds.
    """
    wide = [t.double() for t in (grad_out, q, k, v)]
    expected = run_exact(*wide, is_causal, scale)
    actual = run(grad_out, q, k, v, is_causal, scale)
    assert actual[3].shape == (0,)
    wide_grad, wide_q, wide_k, wide_v = wide
    factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    p = probabilities(wide_q, wide_k, is_causal, factor)
    largest = (wide_grad.abs() @ wide_v.abs().mT).amax(-1, keepdim=True)
    ds = 2 * abs(factor) * p * largest
    scores = abs(factor) * (wide_q.abs() @ wide_k.abs().mT).max().item()
    terms = sum(q.shape[2:]) + sum(v.shape[2:])
    relative = 2 * unit(q.dtype) + 2 * terms * unit(torch.float32) * (1 + scores)
    bounds = (ds @ wide_k.abs(), ds.mT @ wide_q.abs(), p.mT @ wide_grad.abs())
    for a, e, bound in zip(actual, expected, bounds, strict=False):
        assert a.dtype == q.dtype and a.is_contiguous()
        tiny = torch.finfo(q.dtype).smallest_normal
        assert_within(a, e, relative * bound + 2 * unit(q.dtype) * e.abs() + tiny * terms)


def run_exact(grad_out, q, k, v, is_causal, scale):
    return reference.attention_grad(
        grad_out, q, k, v, None, 0.0, None, is_causal, scale, False, False
    )


def probabilities(q, k, is_causal, scale):
    scores = scale * q @ k.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    return scores.softmax(-1)


# batch, heads, queries, keys, d, e: one block of keys, several, widths that are no power of two.
SIZES = (
    (1, 1, 1, 1, 1, 1),
    (2, 3, 37, 37, 16, 16),
    (1, 2, 17, 33, 20, 24),
    (1, 1, 70, 40, 64, 8),
    (1, 1, 3, 290, 16, 40),
)


def test_triton_serves():
    assert memtl.backends.owner("attention_grad", "cpu") == "triton"


@pytest.mark.parametrize("is_causal", (False, True), ids=("all", "causal"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype, is_causal, left):
    compare(*operands(size, dtype), is_causal)
    assert not left


@pytest.mark.parametrize("keys", (65, 129, 257))
def test_blocks_of_keys(keys, left):
    """Of 16 bits: keys in a block of 128, of 256, in several; then wide heads, in several."""
    compare(*operands((1, 1, 66, keys, 16, 16), torch.float16), True)
    compare(*operands((1, 1, 33, keys, 72, 130), torch.float16))
    assert not left


@pytest.mark.parametrize("scale", (0.0, -0.7, 3.0))
def test_scale(scale, left):
    compare(*operands((1, 2, 20, 40, 8, 8)), scale=scale)
    compare(*operands((1, 2, 20, 40, 8, 8), torch.float16), scale=scale)
    assert not left


def test_strides(left):
    """Views of one tensor of q, k and v; columns apart; one row for all."""
    tokens = draw(2, 21, 3, 2, 16).float()  # B, N, three of them, H, d
    q, k, v = (t.transpose(1, 2) for t in tokens.unbind(2))
    grad_out = draw(2, 2, 16, 21, seed=1).float().mT
    assert not any(t.is_contiguous() for t in (grad_out, q, k, v))
    compare(grad_out, q, k, v)
    compare(grad_out[..., ::2], q[..., 1::3], k[..., 1::3], v[..., ::2], True)
    one = draw(1, 2, 1, 16).float().expand(2, 2, 21, 16)
    compare(one, one, k, v)
    assert not left


def test_scores_far_apart(left):
    """Of which most probabilities are 0, and the best comes first or last."""
    grad_out, q, k, v = operands((1, 1, 20, 70, 8, 8))
    for order in (1, -1):
        ramp = torch.linspace(0, order * 60, 70)[:, None]
        compare(grad_out, q.abs() + 1, k + ramp, v)
    assert not left


def test_what_is_not_finite_is_not_hidden(left):
    grad_out, q, k, v = operands((1, 1, 20, 40, 8, 8))
    k[0, 0, 7, 3] = math.nan
    assert all(t.isnan().all() for t in run(grad_out, q, k, v)[:3])
    dq, dk, dv, _ = run(grad_out, q, k, v, is_causal=True)
    assert dq[0, 0, 7:].isnan().all()
    assert dk[0, 0, :20].isnan().all() and dv[0, 0, :20].isnan().all()
    assert not left


def test_equal_arguments_give_equal_bits():
    arguments = operands((1, 2, 37, 70, 16, 16))
    for a, b in zip(run(*arguments), run(*arguments), strict=True):
        assert torch.equal(a, b)


CASES = {
    "mask": {"mask": True},
    "trained mask": {"mask": True, "mask_grad": True},
    "dropout": {"dropout_p": 0.3},
    "fewer key heads": {"enable_gqa": True},
    "float64": {"dtype": torch.float64},
    "bfloat16 on a CPU": {"dtype": torch.bfloat16},
    "wide heads": {"size": (1, 2, 5, 7, 80, 8)},
    "no queries": {"size": (1, 2, 0, 7, 8, 8)},
    "no keys": {"size": (1, 2, 5, 0, 8, 8)},
    "three dimensions": {"flat": True},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_to_torch(case, left):
    options = dict(CASES[case])
    grad_out, q, k, v = operands(
        options.get("size", (1, 4, 5, 7, 8, 8)), options.get("dtype", torch.float32)
    )
    if options.get("enable_gqa"):
        k, v = k[:, :2], v[:, :2]
    if options.get("flat"):
        grad_out, q, k, v = (t.flatten(0, 1) for t in (grad_out, q, k, v))
    mask = draw(5, 7).float() if options.get("mask") else None
    dropout_p = options.get("dropout_p", 0.0)
    state = torch.get_rng_state() if dropout_p else None
    arguments = (grad_out, q, k, v, mask, dropout_p, state, False, None)
    arguments += (options.get("enable_gqa", False), options.get("mask_grad", False))
    actual = op(*arguments)
    assert len(left) == 1
    for a, e in zip(actual, reference.attention_grad(*arguments), strict=True):
        assert torch.equal(a, e)


def test_opcheck():
    grad_out, q, k, v = operands((2, 1, 3, 5, 8, 4))
    torch.library.opcheck(op, (grad_out, q, k, v, None, 0.0, None, True, 0.3, False, False))


def test_gradients_of_the_function():
    _, *tensors = operands((2, 1, 9, 12, 8, 4))
    exact = memtl.storage.Dense()
    results = []
    for function in (
        F.scaled_dot_product_attention,
        lambda *t: memtl.functional.scaled_dot_product_attention(*t, format=exact),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        results.append(torch.autograd.grad(out, leaves, torch.ones_like(out) + out.detach()))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
