"""Weights made again in backward: their values, their gradient, and that nothing is kept."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from memtl import functional as M
from memtl.autograd.share import held, offer, offered
from memtl.autograd.weights import chosen, decoded, encoded, standardized
from memtl.memory import saved_bytes
from memtl.reference.bits import bits_unpack
from memtl.storage import Dense, Quantized, pack
from memtl.storage.rebuilt import rebuilt
from tests.helpers import assert_same, grad_like

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SHAPES = pytest.mark.parametrize("shape", [(7, 3, 3, 3), (5, 1, 2), (4, 64), (2, 3, 1, 2, 3)])
EPS = 1e-5


def reference(w, eps=EPS):
    """As the paper's code writes it."""
    flat = w.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    return (centred / (centred.std(1, keepdim=True) + eps)).view_as(w)


# 8 bits


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_are_within_half_a_scale_exactly(shape, dtype):
    w = torch.randn(shape, dtype=dtype) * 10.0 ** torch.randint(-6, 4, (shape[0],)).view(
        -1, *[1] * (len(shape) - 1)
    )
    codes, scale = encoded(w)
    assert codes.dtype == torch.int8 and codes.shape == w.shape
    assert scale.dtype == torch.float32 and scale.shape == shape[:1]
    assert codes.flatten(1).abs().amax(1).eq(127).all()
    exact = codes.double() * scale.double().view(-1, *[1] * (len(shape) - 1))
    assert_same(decoded(codes, scale, torch.float64), exact)
    assert_same(decoded(codes, scale, torch.float32), exact.float())
    # float64 subtracts these without rounding for float32; for float64 up to an ulp.
    slack = 0 if dtype == torch.float32 else 2e-16 * w.abs().max()
    error = (exact - w.double()).abs().flatten(1).amax(1)
    assert (error <= scale.double() / 2 + slack).all()
    most = w.double().abs().flatten(1).amax(1) / 127
    assert (scale.double() >= most * (1 - 2**-23)).all()
    assert (scale.double() <= most * (1 + 2**-15)).all()


def test_ties_and_quotients_next_to_them_stay_within_half_a_scale():
    scale = torch.tensor(3 * 2.0**-9)
    half = (torch.arange(-127, 127) + 0.5) * scale
    rows = [half, half.nextafter(torch.tensor(9.0)), half.nextafter(torch.tensor(-9.0))]
    w = torch.stack([torch.cat([row, 127 * scale.view(1)]) for row in rows])
    codes, scales = encoded(w)
    assert (scales == scale).all()
    error = (codes.double() * scales.double().view(-1, 1) - w.double()).abs()
    assert (error <= scale.double() / 2).all()


def test_encoding_what_was_decoded_gives_the_same_again():
    codes, scale = encoded(torch.randn(200, 33) * torch.logspace(-30, 30, 200).view(-1, 1))
    again = encoded(decoded(codes, scale, torch.float32))
    assert_same(again[0], codes)
    assert_same(again[1], scale)


def test_zero_and_tiny_channels():
    w = torch.stack([torch.zeros(5), torch.full((5,), 1e-44), torch.full((5,), -1e-33)])
    codes, scale = encoded(w)
    back = decoded(codes, scale, torch.float32)
    assert (back[0] == 0).all() and back.isfinite().all() and (scale > 0).all()
    assert ((back - w).abs() <= scale.view(-1, 1) / 2).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), torch.finfo().max])
def test_what_is_not_finite_is_refused(value):
    w = torch.randn(4, 6)
    w[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        encoded(w)


# what a layer keeps of its weight


def layers(w):
    """A layer for a weight of any shape, and an input for it."""
    if w.dim() == 2:
        return lambda x, w: M.linear(x, w, format=Dense()), torch.randn(3, w.shape[1])
    conv = {3: M.conv1d, 4: M.conv2d, 5: M.conv3d}[w.dim()]
    x = torch.randn(2, w.shape[1], *(5, 6, 7)[: w.dim() - 2])
    return lambda x, w: conv(x, w, format=Dense()), x


@SHAPES
@DTYPES
@pytest.mark.parametrize("cast", [False, True])
def test_gradients_are_bit_for_bit_those_of_the_weight_itself(shape, dtype, cast):
    codes, scale = encoded(torch.randn(shape))
    layer, x = layers(codes)
    x = x.to(dtype).requires_grad_()
    results = []
    for w in (decoded(codes, scale, dtype), decoded(codes, scale, dtype).clone()):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = layer(x, w)
        g = torch.autograd.grad(out, x, torch.full_like(out, 0.7))[0]
        results.append((out.detach(), g))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


@SHAPES
def test_codes_are_kept_in_place_of_the_weight(shape):
    codes, scale = encoded(torch.randn(shape))
    layer, x = layers(codes)
    x.requires_grad_()
    saved = saved_bytes(lambda: layer(x, decoded(codes, scale, torch.float32)))
    assert saved == codes.numel() + 4 * len(scale)
    x = x.detach()
    assert saved_bytes(lambda: layer(x, decoded(codes, scale, torch.float32))) == 0


def test_transposed_layers_too():
    for run, weight_size, x_size in (
        (M.conv_transpose2d, (6, 4, 3, 3), (2, 6, 5, 5)),
        (partial(M.linear, transposed=True), (6, 4), (2, 6)),
    ):
        codes, scale = encoded(torch.randn(weight_size))
        x, w = torch.randn(x_size, requires_grad=True), decoded(codes, scale, torch.float32)
        one, two = (run(x, v, format=Dense()).square().sum() for v in (w, w.clone()))
        assert_same(torch.autograd.grad(one, x)[0], torch.autograd.grad(two, x)[0])


def test_a_change_in_place_ends_the_offer():
    codes, scale = encoded(torch.randn(4, 6))
    w = decoded(codes, scale, torch.float32)
    assert offered(w) is not None
    w.mul_(2)
    x = torch.randn(3, 6, requires_grad=True)
    M.linear(x, w, format=Dense()).sum().backward()
    assert_same(x.grad, torch.ones(3, 4) @ w)
    w = decoded(codes, scale, torch.float32)
    out = M.linear(x, w, format=Dense())
    codes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_weight_is_not_taken_from_what_rounds_it():
    y = torch.randn(4, 64, requires_grad=True) * 2
    packed = pack(y.detach(), Quantized(4))
    offer(y, packed)
    assert held(y).tensors == (y,)
    offer(y, rebuilt(torch.neg, packed, shape=y.shape, dtype=y.dtype))
    assert held(y).tensors == (y,)


# standardisation


@SHAPES
def test_standardised_weights_are_the_papers(shape):
    w = torch.randn(shape, dtype=torch.float64) * 3 + 1
    ours = standardized(w, EPS)
    torch.testing.assert_close(ours, reference(w), rtol=1e-12, atol=1e-12)
    half = w.bfloat16()
    assert_same(standardized(half, EPS), standardized(half.float(), EPS).bfloat16())
    last = w[:, :1].transpose(0, -1).contiguous().transpose(0, -1)
    if last[0].numel() > 1:
        assert standardized(last, EPS).stride() == last.stride()


@SHAPES
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_the_gradient_is_exact(shape, eps):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda w: standardized(w, eps), w)
    g = torch.randn(shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(f(w, eps), w, g)[0] for f in (standardized, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_constant_channel_has_a_finite_gradient():
    w = torch.randn(3, 8)
    w[1] = 0.5
    w.requires_grad_()
    out = standardized(w, EPS)
    assert (out[1] == 0).all()
    out.backward(grad_like(out))
    assert w.grad.isfinite().all()


def test_a_second_derivative_is_refused():
    w = torch.randn(3, 8, requires_grad=True)
    (g,) = torch.autograd.grad(standardized(w, 1e-5).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()


def test_nothing_is_kept_of_the_standardisation():
    w = torch.nn.Parameter(torch.randn(6, 3, 3, 3))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    # x and w, by reference.
    kept = saved_bytes(lambda: M.conv2d(x, standardized(w, 1e-5), format=Dense()))
    assert kept == 4 * (x.numel() + w.numel())
    frozen = w.detach()
    kept = saved_bytes(lambda: M.conv2d(x, standardized(frozen, 1e-5), format=Dense()))
    assert kept == 4 * w.numel()
    x = x.detach()
    assert saved_bytes(lambda: M.conv2d(x, standardized(frozen, 1e-5), format=Dense())) == 0


@DTYPES
def test_rebuilt_standardised_weights_are_bit_for_bit_the_same(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype).requires_grad_()
    codes, scale = encoded(torch.randn(6, 3, 3, 3))
    for w in (torch.randn(6, 3, 3, 3).to(dtype), decoded(codes, scale, dtype)):
        one = M.conv2d(x, standardized(w, 1e-5), format=Dense())
        two = M.conv2d(x, standardized(w, 1e-5).clone(), format=Dense())
        g = grad_like(one)
        assert_same(torch.autograd.grad(one, x, g)[0], torch.autograd.grad(two, x, g)[0])


def test_standardised_codes_keep_the_codes():
    codes, scale = encoded(torch.randn(6, 3, 3, 3))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)

    def run():
        return M.conv2d(x, standardized(decoded(codes, scale, torch.float32), 1e-5), format=Dense())

    assert saved_bytes(run) == codes.numel() + 4 * len(scale)


def test_inside_a_checkpoint_and_compiled():
    w = torch.randn(6, 3, 3, 3, requires_grad=True)
    codes, scale = encoded(torch.randn(4, 6, 3, 3))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)

    def run(x, w):
        h = M.conv2d(x, standardized(w, 1e-5), format=Dense())
        return M.conv2d(h, decoded(codes, scale, torch.float32), format=Dense()).square().sum()

    expected = torch.autograd.grad(run(x, w), (x, w))
    again = torch.autograd.grad(checkpoint(run, x, w, use_reentrant=False), (x, w))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(x, w), (x, w))
    for a, b, c in zip(expected, again, traced, strict=True):
        assert_same(b, a)
        torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-5)


# what scores choose


def scored(shape, dtype=torch.float64):
    """A frozen weight, scores of either sign (one is 0), and the bits of the larger half."""
    w, scores = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    scores.view(-1)[0] = 0
    (bits,) = M.magnitude_masks([scores], scores.numel() // 2)
    return w, scores.requires_grad_(), bits


@SHAPES
def test_gradients_go_straight_through_the_choice(shape):
    """They are those of g w |s|, for pruned weights too."""
    w, scores, bits = scored(shape)
    kept = bits_unpack(bits, w.numel()).view(shape)
    out = chosen(w, scores, bits)
    assert_same(out.detach(), w.masked_fill(~kept, 0))
    g = torch.randn(shape, dtype=torch.float64)
    (ours,) = torch.autograd.grad(out, scores, g)
    step = 1e-6 * torch.ones_like(w)
    rise = ((scores + step).abs() - (scores - step).abs()).detach() / 2e-6
    rise.view(-1)[0] = 1  # |s| has a kink at 0, which counts as positive
    torch.testing.assert_close(ours, g * w * rise, rtol=1e-8, atol=1e-8)
    assert (ours[~kept] != 0).all()


@DTYPES
def test_scores_of_a_narrow_weight_are_wide(dtype):
    w, scores, bits = scored((5, 9), torch.float32)
    w = w.to(dtype)
    out = chosen(w, scores, bits)
    assert out.dtype == dtype
    g = grad_like(out)
    (ours,) = torch.autograd.grad(out, scores, g)
    sign = torch.where(scores < 0, -1.0, 1.0)
    assert_same(ours, w.float() * g.float() * sign)


def test_the_weight_has_no_gradient_and_scores_no_second_one():
    w, scores, bits = scored((5, 9))
    w.requires_grad_()
    out = chosen(w, scores, bits)
    none, grad = torch.autograd.grad(
        out.square().sum(), (w, scores), allow_unused=True, create_graph=True
    )
    assert none is None
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@SHAPES
def test_what_is_chosen_is_made_again_in_backward(shape):
    w, scores, bits = scored(shape, torch.float32)
    layer, x = layers(w)
    x.requires_grad_()
    # Parameters and bits are there anyway; here they are not, and count.
    kept = saved_bytes(lambda: layer(x, chosen(w, scores, bits)))
    assert kept == 4 * (x.numel() + w.numel() + scores.numel()) + bits.numel()
    frozen = scores.detach()
    assert saved_bytes(lambda: layer(x, chosen(w, frozen, bits))) == 4 * w.numel() + bits.numel()
    with torch.no_grad():
        assert saved_bytes(lambda: layer(x, chosen(w, scores, bits))) == 0
    one, two = layer(x, chosen(w, scores, bits)), layer(x, chosen(w, scores, bits).clone())
    g = grad_like(one)
    for a, b in zip(
        torch.autograd.grad(one, (x, scores), g),
        torch.autograd.grad(two, (x, scores), g),
        strict=True,
    ):
        assert_same(a, b)


def test_chosen_inside_a_checkpoint_and_compiled():
    w, scores, bits = scored((6, 3, 3, 3), torch.float32)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)

    def run(x, scores):
        return M.conv2d(x, chosen(w, scores, bits), format=Dense()).square().sum()

    expected = torch.autograd.grad(run(x, scores), (x, scores))
    again = torch.autograd.grad(checkpoint(run, x, scores, use_reentrant=False), (x, scores))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(x, scores), (x, scores))
    for a, b, c in zip(expected, again, traced, strict=True):
        assert_same(b, a)
        torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-5)


def test_empty_and_scattered_weights():
    for w in (torch.randn(0, 4), torch.randn(6, 4).t(), torch.randn(5, 8)[:, ::2]):
        scores = torch.randn(w.shape, requires_grad=True)
        (bits,) = M.magnitude_masks([scores], w.numel() // 2)
        kept = bits_unpack(bits, w.numel()).view(w.shape)
        out = chosen(w, scores, bits)
        assert_same(out.detach(), w.masked_fill(~kept, 0))
        (grad,) = torch.autograd.grad(out, scores, torch.ones_like(out))
        assert_same(grad, w * torch.where(scores < 0, -1.0, 1.0))
