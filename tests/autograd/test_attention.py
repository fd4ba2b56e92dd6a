"""Softmax and attention: gradients from stored operands, dropout replayed, masks of every kind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memtl import functional as M
from memtl.memory import saved_bytes
from memtl.storage import Bits, Dense, Quantized, TopK, pack
from tests.helpers import FORMATS, assert_same, assert_within, cosine, grad_like, leaves, run

EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
NOT_TOPK = {name: f for name, f in FORMATS.items() if not isinstance(f, TopK)}
FOUR = Quantized(4)
STATE = torch.get_rng_state().numel()


def operands(*shape, count=3):
    return [torch.randn(shape) for _ in range(count)]


# ---------------------------------------------------------------------------------------- softmax


@EVERY_FORMAT
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax_gradient_follows_the_formula_on_the_unpacked_result(format, dim):
    (x,) = leaves([torch.randn(4, 5, 33)])
    out = M.softmax(x, dim, format=format)
    g = grad_like(out)
    out.backward(g)
    if isinstance(format, Quantized):
        y = pack(out.detach().sqrt(), format).unpack().double().square()
    else:
        y = pack(out.detach(), format).unpack().double()
    expected = y * (g.double() - (g.double() * y).sum(dim, keepdim=True))
    assert_within(x.grad, expected, 1e-6 * g.abs().max())
    assert saved_bytes(M.softmax, x, dim, format=format) == format.nbytes(x.shape, x.dtype)


def test_few_bits_hold_the_root_of_probabilities_more_faithfully():
    scores, g = torch.randn(8, 64, 197), torch.randn(8, 64, 197)
    y = scores.double().softmax(-1)

    def grad(y):
        return y * (g - (g * y).sum(-1, keepdim=True))

    (x,) = leaves([scores])
    M.softmax(x, -1, format=Quantized(4)).backward(g)
    plain = grad(pack(y.float(), Quantized(4)).unpack().double())
    error = (x.grad - grad(y)).norm(), (plain - grad(y)).norm()
    assert error[0] < 0.7 * error[1]


def test_softmax_in_float32_of_a_bfloat16_input():
    """Eager attention in transformers."""
    (x,) = leaves([torch.randn(4, 33).bfloat16()])
    out = M.softmax(x, -1, torch.float32, format=Dense())
    assert_same(out.detach(), F.softmax(x.detach(), -1, dtype=torch.float32))
    out.backward(grad_like(out))
    assert x.grad.dtype == torch.bfloat16


# ----------------------------------------------------------------------------- attention, replayed


@pytest.mark.parametrize("format", NOT_TOPK.values(), ids=NOT_TOPK)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_are_those_of_torchs_attention_on_the_unpacked_operands(format, dropout_p):
    tensors = operands(2, 3, 9, 16)
    _, grads, _ = run(
        lambda *t: M.scaled_dot_product_attention(*t, dropout_p=dropout_p, format=format), tensors
    )
    stored = [pack(t, format).unpack() for t in tensors]
    _, expected, _ = run(lambda *t: F.scaled_dot_product_attention(*t, dropout_p=dropout_p), stored)
    for ours, stock in zip(grads, expected, strict=True):
        assert_same(ours, stock)


def test_backward_leaves_the_generator_alone():
    inputs = leaves(operands(2, 3, 9, 16))
    out = M.scaled_dot_product_attention(*inputs, dropout_p=0.5, format=FOUR)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    out.backward(grad_like(out))
    assert_same(torch.get_rng_state(), before)


def test_each_call_replays_its_own_dropout():
    inputs = leaves(operands(1, 2, 6, 8))
    torch.manual_seed(0)
    calls = [
        M.scaled_dot_product_attention(*inputs, dropout_p=0.5, format=Dense()) for _ in range(2)
    ]
    ours = [torch.autograd.grad(out, inputs, grad_like(out)) for out in reversed(calls)][::-1]
    torch.manual_seed(0)
    calls = [F.scaled_dot_product_attention(*inputs, dropout_p=0.5) for _ in range(2)]
    stock = [torch.autograd.grad(out, inputs, grad_like(out)) for out in calls]
    for a, b in zip(ours, stock, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours[0][0], ours[1][0])


def test_dropout_under_checkpointing():
    tensors = operands(2, 3, 9, 16)

    def attend(*t):
        return M.scaled_dot_product_attention(*t, dropout_p=0.5, format=FOUR)

    out, grads, _ = run(attend, tensors)
    again, checkpointed, _ = run(lambda *t: checkpoint(attend, *t, use_reentrant=False), tensors)
    assert_same(again, out)
    for a, b in zip(checkpointed, grads, strict=True):
        assert_same(a, b)


@EVERY_FORMAT
def test_bytes(format):
    q, k, v = torch.randn(2, 3, 10, 64), *operands(2, 3, 12, 64, count=2)
    kept = sum(format.nbytes(t.shape, t.dtype) for t in (q, k, v))
    inputs = leaves((q, k, v))
    if isinstance(format, TopK):
        probabilities = torch.Size((2, 3, 10, 12))
        kept += format.nbytes(probabilities, torch.float32)
        with_dropout = kept + Bits().nbytes(probabilities, torch.bool)
    else:
        with_dropout = kept + STATE
    attend = M.scaled_dot_product_attention
    assert saved_bytes(attend, *inputs, format=format) == kept
    assert saved_bytes(attend, *inputs, is_causal=True, format=format) == kept
    assert saved_bytes(attend, *inputs, dropout_p=0.3, format=format) == with_dropout


def test_a_mask_is_kept_by_reference_once():
    inputs = [t * 1 for t in leaves(operands(2, 3, 10, 64))]
    kept = 3 * FOUR.nbytes(inputs[0].shape, torch.float32)
    mask = torch.randn(10, 10)

    def layers():
        out = M.scaled_dot_product_attention(*inputs, mask, format=FOUR)
        return M.scaled_dot_product_attention(out, *inputs[1:], mask, format=FOUR)

    # k and v, which both layers read, are kept once too.
    assert saved_bytes(layers) == kept + kept // 3 + 4 * mask.numel()


def test_only_what_is_asked_for_gets_a_gradient():
    tensors = operands(2, 3, 7, 8)
    for format in (FOUR, TopK(0.3)):
        for i in range(3):
            needs = [j == i for j in range(3)]
            _, grads, _ = run(
                lambda *t, f=format: M.scaled_dot_product_attention(*t, format=f), tensors, needs
            )
            assert [g is not None for g in grads] == needs


# --------------------------------------------------------------------- attention, explicit (top-k)


def explicit_gradients(q, k, v, p, noise, g, scale):
    dropped = p * noise
    dp = (g @ v.mT) * noise
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    return ds @ k * scale, ds.mT @ q * scale, dropped.mT @ g


@pytest.mark.parametrize("format", [TopK(0.3), TopK(0.3, values="fp32"), TopK(0.5, "sample")])
@pytest.mark.parametrize("is_causal", [False, True])
def test_top_k_gradients_follow_the_formula_on_the_unpacked_tensors(format, is_causal):
    tensors = [t.double() for t in operands(2, 3, 9, 16)]
    q, k, v = tensors
    _, grads, _ = run(
        lambda *t: M.scaled_dot_product_attention(*t, is_causal=is_causal, format=format), tensors
    )
    scores = q @ k.mT / 4
    if is_causal:
        scores.masked_fill_(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    g = grad_like(q)
    stored = [pack(t, format).unpack() for t in (q, k, v, scores.softmax(-1))]
    expected = explicit_gradients(*stored, torch.ones_like(scores), g, 0.25)
    for ours, wanted in zip(grads, expected, strict=True):
        # The probabilities are packed in float32; a rounding there may move a stored entry.
        assert_within(ours, wanted, 1e-5 * wanted.abs().max())


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.37},
    "negative-scale": {"scale": -0.37},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 7, 8), (2, 3, 7, 8)),
        ((3, 7, 8), (3, 5, 8)),
        ((7, 8), (5, 8)),
        ((1, 3, 7, 8), (2, 3, 5, 8)),
        ((2, 3, 7, 8), (1, 1, 5, 8)),
        ((2, 2, 3, 7, 8), (2, 2, 3, 5, 8)),
    ],
    ids=str,
)
def test_top_k_that_keeps_everything_gives_stock_gradients(shapes, dropout_p, options):
    everything = TopK(1.0, values="fp32")
    query, key = shapes
    tensors = torch.randn(query), torch.randn(key), torch.randn(key)
    options = {**options, "dropout_p": dropout_p}
    out, grads, state = run(
        lambda *t: M.scaled_dot_product_attention(*t, **options, format=everything), tensors
    )
    expected, stock, stock_state = run(
        lambda *t: F.scaled_dot_product_attention(*t, **options), tensors
    )
    assert_same(out, expected)
    assert_same(state, stock_state)
    for ours, theirs in zip(grads, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("lead", [(2,), (), (2, 2)])
def test_grouped_queries_under_top_k(lead, dropout_p):
    tensors = [torch.randn(*lead, heads, 5, 8) for heads in (6, 2, 2)]
    options = {"enable_gqa": True, "dropout_p": dropout_p}
    everything = TopK(1.0, values="fp32")
    out, grads, _ = run(
        lambda *t: M.scaled_dot_product_attention(*t, **options, format=everything), tensors
    )
    expected, stock, _ = run(lambda *t: F.scaled_dot_product_attention(*t, **options), tensors)
    assert_same(out, expected)
    for ours, theirs in zip(grads, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


MASKS = {
    "bool": torch.ones(2, 1, 7, 7, dtype=torch.bool).tril(1),
    "additive": torch.randn(7, 7),
    "a-row-masked-fully": torch.ones(7, 7, dtype=torch.bool).index_fill(0, torch.tensor([2]), 0),
    "a-row-of-minus-inf": torch.zeros(7, 7).index_fill(0, torch.tensor([2]), -math.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("format", [Dense(), TopK(1.0, values="fp32")], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_masks(mask, format, dropout_p):
    tensors = operands(2, 3, 7, 8)
    out, grads, _ = run(
        lambda *t: M.scaled_dot_product_attention(*t, mask, dropout_p, format=format), tensors
    )
    expected, stock, _ = run(
        lambda *t: F.scaled_dot_product_attention(*t, mask, dropout_p), tensors
    )
    assert_same(out, expected)
    for ours, theirs in zip(grads, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", [(7, 7), (2, 1, 7, 7), (1, 3, 1, 7)])
@pytest.mark.parametrize("format", [Dense(), TopK(1.0, values="fp32")], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_a_mask_that_trains(shape, format, dropout_p):
    """Relative position biases, in T5 and Swin."""
    tensors = [*operands(2, 3, 7, 8), torch.randn(shape)]
    _, grads, _ = run(
        lambda *t: M.scaled_dot_product_attention(*t, dropout_p, format=format), tensors
    )
    _, stock, _ = run(lambda *t: F.scaled_dot_product_attention(*t, dropout_p), tensors)
    for ours, theirs in zip(grads, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    only = [False, False, False, True]
    _, alone, _ = run(
        lambda *t: M.scaled_dot_product_attention(*t, dropout_p, format=format), tensors, only
    )
    torch.testing.assert_close(alone[3], grads[3], rtol=1e-5, atol=1e-6)


def test_bad_masks_are_named():
    inputs = leaves(operands(2, 3, 7, 8))
    attend = M.scaled_dot_product_attention
    with pytest.raises(TypeError, match=r"attn_mask must be a tensor or None, got list"):
        attend(*inputs, [[True] * 7] * 7)
    with pytest.raises(TypeError, match=r"attn_mask must be bool or floating point, got torch.int"):
        attend(*inputs, torch.ones(7, 7, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected attn_mask or is_causal, got both"):
        attend(*inputs, torch.ones(7, 7, dtype=torch.bool), is_causal=True)


# --------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("format", [Dense(), FOUR, TopK(0.5)], ids=str)
def test_compiled_dropout_uses_one_mask_both_ways(format, is_causal):
    """With the identity as v, the output is the dropped probabilities themselves."""
    torch._dynamo.reset()
    n = 24
    one = torch.eye(n).expand(2, 3, n, n)
    q, k, v = leaves((torch.randn(2, 3, n, 8), torch.randn(2, 3, n, 8), one))
    attend = torch.compile(
        lambda q, k, v: M.scaled_dot_product_attention(
            q, k, v, dropout_p=0.4, is_causal=is_causal, format=format
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    out = attend(q, k, v)
    g = grad_like(out)
    out.backward(g)
    dropped = out.detach()
    scores = q.detach() @ k.detach().mT / math.sqrt(8)
    if is_causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    p = scores.softmax(-1)
    kept = dropped != 0
    possible = p > 0
    assert not kept[~possible].any()
    share = kept[possible].float().mean()
    assert abs(share - 0.6) < 6 * math.sqrt(0.24 / possible.sum())  # six standard deviations
    torch.testing.assert_close(dropped, torch.where(kept, p / 0.6, 0), rtol=1e-4, atol=1e-6)
    stored = [pack(t.detach(), format).unpack() for t in (q, k, v, p)]
    expected = explicit_gradients(*stored, kept / 0.6, g, 1 / math.sqrt(8))
    for ours, wanted in zip((q.grad, k.grad, v.grad), expected, strict=True):
        if format == FOUR:  # p's last bit decides its dither, and is not the test's to know
            assert cosine(ours, wanted) > 0.95
        else:
            assert_within(ours, wanted, 2e-4 * wanted.abs().max())


def test_compiled_dropout_keeps_a_bit_an_element():
    torch._dynamo.reset()
    inputs = leaves(operands(2, 3, 16, 64))
    attend = torch.compile(
        lambda *t: M.scaled_dot_product_attention(*t, dropout_p=0.4, format=FOUR),
        fullgraph=True,
        backend="aot_eager",
    )
    attend(*inputs)  # compile first: what tracing touches is not what is kept
    map_shape = torch.Size((2, 3, 16, 16))
    expected = 3 * FOUR.nbytes(inputs[0].shape, torch.float32)
    expected += FOUR.nbytes(map_shape, torch.float32) + Bits().nbytes(map_shape, torch.bool)
    assert saved_bytes(attend, *inputs) == expected
