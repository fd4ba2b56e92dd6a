"""Activations: the derivative in a fixed-range code; ReLU and dropout from one bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from memtl import functional as M
from memtl.autograd.activation import ACTIVATIONS
from memtl.memory import saved_bytes
from memtl.storage import Dense, Quantized, TopK, pack
from tests.helpers import assert_same, grad_like, leaves

NAMES = {"gelu_tanh": lambda x, **o: M.gelu(x, "tanh", **o)}
EVERY = pytest.mark.parametrize("name", sorted(ACTIVATIONS))


def function(name):
    return NAMES.get(name) or getattr(M, name)


@EVERY
def test_derivatives_lie_in_their_declared_range_and_nearly_fill_it(name):
    activation = ACTIVATIONS[name]
    x = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    derivative = activation.derivative(x)
    assert activation.lo < derivative.min() < activation.lo + 0.002
    assert activation.hi - 0.002 < derivative.max() < activation.hi


@EVERY
def test_derivatives_are_the_derivatives_of_the_forward(name):
    activation = ACTIVATIONS[name]
    (x,) = leaves([torch.randn(1000, dtype=torch.float64) * 3])
    (expected,) = torch.autograd.grad(activation.forward(x).sum(), x)
    torch.testing.assert_close(activation.derivative(x.detach()), expected, rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradient_is_the_stored_derivative(name, bits):
    activation = ACTIVATIONS[name]
    (x,) = leaves([torch.randn(3, 77) * 2])
    out = function(name)(x, format=Quantized(bits, seed=5))
    g = grad_like(out)
    out.backward(g)
    derivative = activation.derivative(x.detach())
    stored = pack(derivative, Quantized(bits, (activation.lo, activation.hi), 5)).unpack()
    assert_same(x.grad, g * stored)
    step = (activation.hi - activation.lo) / (2**bits - 2)
    assert (stored - derivative).abs().max() < step * (1 + 1e-5)


@EVERY
@pytest.mark.parametrize("format", [Dense(), Dense("bf16"), TopK(0.3)], ids=str)
def test_under_other_formats_the_input_is_kept(name, format):
    (x,) = leaves([torch.randn(3, 77) * 2])
    out = function(name)(x, format=format)
    g = grad_like(out)
    out.backward(g)
    stored = pack(x.detach(), format).unpack()
    assert_same(x.grad, g * ACTIVATIONS[name].derivative(stored))
    assert saved_bytes(function(name), x, format=format) == format.nbytes(x.shape, x.dtype)


@EVERY
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bytes(name, bits):
    (x,) = leaves([torch.randn(5, 128)])
    assert saved_bytes(function(name), x, format=Quantized(bits)) == 5 * 128 * bits // 8


@EVERY
def test_one_element_that_is_not_finite_leaves_its_neighbours_alone(name):
    clean = torch.randn(3, 77)
    spoiled = clean.clone()
    spoiled.view(-1)[[10, 70, 150]] = torch.tensor([math.nan, math.inf, -math.inf])
    grads = []
    for values in (clean, spoiled):
        (x,) = leaves([values])
        # The dither depends on every element of a group: neighbours move by a step at most.
        out = function(name)(x, format=Quantized(8))
        out.backward(torch.ones_like(out))
        grads.append(x.grad.view(-1))
    others = torch.ones(231, dtype=torch.bool)
    others[[10, 70, 150]] = False
    step = (ACTIVATIONS[name].hi - ACTIVATIONS[name].lo) / 254
    assert (grads[0] - grads[1])[others].abs().max() <= step * (1 + 1e-4)
    assert grads[1][10].isnan()
    (x,) = leaves([spoiled])
    ACTIVATIONS[name].forward(x).sum().backward()
    stock = x.grad.view(-1)
    assert (grads[1].isfinite() == stock.isfinite()).all()


def test_gelu_refuses_an_unknown_form():
    with pytest.raises(ValueError, match=r"'none' or 'tanh', got 'sigmoid'"):
        M.gelu(torch.randn(3), "sigmoid")


def test_relu_is_exact_also_at_zero_and_nan():
    values = torch.tensor([-1.0, -0.0, 0.0, 1e-40, 2.0, math.nan, math.inf, -math.inf])
    g = torch.randn(8)
    results = []
    for fn in (M.relu, F.relu):
        (x,) = leaves([values])
        out = fn(x)
        out.backward(g)
        results.append((out.detach(), x.grad))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", [(8,), (3, 43), (0, 4), (1,), ()])
def test_one_bit_an_element(shape):
    (x,) = leaves([torch.randn(shape)])
    wanted = -(-x.numel() // 8)
    assert saved_bytes(M.relu, x) == wanted
    assert saved_bytes(M.dropout, x, 0.2) == wanted


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dropout_draws_torchs_mask_and_scales_both_ways_alike(p, dtype):
    values = torch.randn(5, 91).to(dtype)
    results = []
    for fn in (M.dropout, F.dropout):
        (x,) = leaves([values])
        torch.manual_seed(11)
        out = fn(x, p)
        state = torch.get_rng_state()
        g = grad_like(out)
        out.backward(g)
        results.append((out.detach(), x.grad, state))
    (out, grad, state), (expected, stock, stock_state) = results
    assert_same(out, expected)
    assert_same(state, stock_state)
    # The scale is rounded once by us, and twice by stock (the noise, then the product).
    torch.testing.assert_close(grad, stock, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert_same(grad == 0, stock == 0)


def test_dropout_of_a_strided_input_draws_torchs_mask():
    x = torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last).requires_grad_()
    for view in (x, x.transpose(0, 1), x[:, ::2]):
        torch.manual_seed(4)
        ours = M.dropout(view, 0.5)
        torch.manual_seed(4)
        expected = F.dropout(view, 0.5)
        assert_same(ours.detach(), expected.detach())
        g = grad_like(ours)
        (ours_grad,) = torch.autograd.grad(ours, x, g)
        (stock_grad,) = torch.autograd.grad(expected, x, g)
        torch.testing.assert_close(ours_grad, stock_grad)


def test_dropout_outside_training_is_the_identity():
    (x,) = leaves([torch.randn(40)])
    state = torch.get_rng_state()
    assert_same(M.dropout(x, 0.5, training=False).detach(), x.detach())
    assert_same(torch.get_rng_state(), state)
    assert saved_bytes(M.dropout, x, 0.5, False) == 0


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_dropout_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\], got"):
        M.dropout(torch.randn(3), p)


def test_compiled_dropout_uses_one_mask_both_ways():
    torch._dynamo.reset()
    (x,) = leaves([torch.randn(40, 50) + 5])
    out = torch.compile(M.dropout, fullgraph=True, backend="aot_eager")(x, 0.3)
    g = grad_like(out)
    out.backward(g)
    kept = out.detach() != 0
    assert abs(kept.float().mean() - 0.7) < 6 * math.sqrt(0.21 / 2000)  # six standard deviations
    torch.testing.assert_close(out.detach(), torch.where(kept, x.detach() / 0.7, 0))
    torch.testing.assert_close(x.grad, torch.where(kept, g / 0.7, 0))
