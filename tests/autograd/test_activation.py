"""Activations: the derivative in a fixed-range code; ReLU and dropout from one bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from memtl import functional as M
from memtl.autograd.activation import ACTIVATIONS, FUSED, activation
from memtl.autograd.mask import MASKS
from memtl.memory import saved_bytes
from memtl.storage import Dense, Packed, Quantized, TopK, pack
from tests.helpers import assert_same, grad_like, leaves, run

NAMES = {"gelu_tanh": lambda x, **o: M.gelu(x, "tanh", **o)}
EVERY = pytest.mark.parametrize("name", sorted(ACTIVATIONS))
# What an in-place form is compared with, and how it is called.
IN_PLACE = {
    "silu": (F.silu, {}),
    "mish": (F.mish, {}),
    "hardswish": (F.hardswish, {}),
    "elu": (F.elu, {"alpha": 0.7}),
    "selu": (F.selu, {}),
    "celu": (F.celu, {"alpha": 0.7}),
    "relu": (F.relu, {}),
    "relu6": (F.relu6, {}),
    "hardtanh": (F.hardtanh, {"min_val": -0.5, "max_val": 0.4}),
    "hardsigmoid": (F.hardsigmoid, {}),
    "leaky_relu": (F.leaky_relu, {"negative_slope": 0.1}),
    "threshold": (F.threshold, {"threshold": 0.2, "value": -3.0}),
}


def function(name):
    return NAMES.get(name) or getattr(M, name)


@EVERY
def test_derivatives_lie_in_their_declared_range_and_nearly_fill_it(name):
    act = activation(name)
    x = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    derivative = act.derivative(x)
    assert act.lo <= derivative.min() < act.lo + 0.002
    assert act.hi - 0.002 < derivative.max() <= act.hi


@EVERY
def test_derivatives_are_the_derivatives_of_the_forward(name):
    act = activation(name)
    (x,) = leaves([torch.randn(1000, dtype=torch.float64) * 3])
    (expected,) = torch.autograd.grad(act.forward(x).sum(), x)
    torch.testing.assert_close(act.derivative(x.detach()), expected, rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_gradient_is_the_stored_derivative(name, bits):
    act = activation(name)
    (x,) = leaves([torch.randn(3, 77) * 2])
    out = function(name)(x, format=Quantized(bits, seed=5))
    g = grad_like(out)
    out.backward(g)
    derivative, code = act.derivative(x.detach()), Quantized(bits, (act.lo, act.hi), 5)
    if name in FUSED:
        rounding = (bits, FUSED[name], act.lo, act.hi, 5)
        codes = torch.ops.memtl.quant_pack_derivative(x.detach(), *rounding)
        stored = Packed(code, (codes,), x.shape, x.dtype).unpack()
    else:
        stored = pack(derivative, code).unpack()
    assert_same(x.grad, g * stored)
    step = (act.hi - act.lo) / (2**bits - 2)
    assert (stored - derivative).abs().max() < step * (1 + 1e-5) + 2e-6  # what f' may be off


@EVERY
@pytest.mark.parametrize("format", [Dense(), Dense("bf16"), TopK(0.3)], ids=str)
def test_under_other_formats_the_input_is_kept(name, format):
    (x,) = leaves([torch.randn(3, 77) * 2])
    out = function(name)(x, format=format)
    g = grad_like(out)
    out.backward(g)
    stored = pack(x.detach(), format).unpack()
    expected = g * activation(name).derivative(stored)
    torch.testing.assert_close(x.grad, expected)  # torch's own kernel may round otherwise
    assert saved_bytes(function(name), x, format=format) == format.nbytes(x.shape, x.dtype)


@EVERY
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
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
    step = (activation(name).hi - activation(name).lo) / 254
    assert (grads[0] - grads[1])[others].abs().max() <= step * (1 + 1e-4)
    assert grads[1][10].isnan()
    (x,) = leaves([spoiled])
    activation(name).forward(x).sum().backward()
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


def in_place(function, format, **options):
    """``function`` in place on a result, as a model does after a linear layer."""
    formatted = {} if format is None else {"format": format}

    def run(x):
        y = x * 1.0
        out = function(y, **options, inplace=True, **formatted)
        assert out is y
        return out

    return run


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("format", [Quantized(4), Dense(), TopK(0.5)], ids=str)
def test_in_place_forms_overwrite_x_and_give_the_gradients_of_the_others(name, format):
    stock, options = IN_PLACE[name]
    values, function = torch.randn(3, 5, 43), getattr(M, name)
    format = None if name in MASKS else format
    formatted = {} if format is None else {"format": format}
    results = [
        run(fn, [values])
        for fn in (
            in_place(function, format, **options),
            lambda x: function(x * 1.0, **options, **formatted),
            in_place(stock, None, **options),
        )
    ]
    (out, (grad,), _), (same_out, (same_grad,), _), (stock_out, (stock_grad,), _) = results
    assert_same(out, stock_out)
    assert_same(out, same_out)
    if format is None or format.exact:  # of y in place, as in torch
        assert_same(grad, stock_grad)
        torch.testing.assert_close(grad, same_grad)
    else:
        assert_same(grad, same_grad)
    kept = 0 if format is None else format.nbytes(values.shape, values.dtype)
    if format is None:
        kept = -(-values.numel() // 8)
    elif isinstance(format, Quantized):
        kept -= 4 * -(-values.numel() // 64)  # the derivative's code has no scale
    x = values.clone().requires_grad_()
    assert saved_bytes(in_place(function, format, **options), x) == kept


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_methods_in_place(name):
    values = torch.randn(3, 77)
    out, (grad,), _ = run(in_place(getattr(M, name), Quantized(8)), [values])
    expected, (stock,), _ = run(lambda x: getattr(x * 1.0, name + "_")(), [values])
    assert_same(out, expected)
    torch.testing.assert_close(grad, stock, atol=0.02, rtol=0)


def test_dropout_in_place_draws_torchs_mask():
    values = torch.randn(5, 91)
    results = [run(in_place(fn, None, p=0.3), [values], seed=3) for fn in (M.dropout, F.dropout)]
    (out, (grad,), state), (expected, (stock,), stock_state) = results
    assert_same(out, expected)
    assert_same(state, stock_state)
    torch.testing.assert_close(grad, stock)


@pytest.mark.parametrize("name", ["relu", "silu", "leaky_relu"])
def test_in_place_on_a_view_changes_its_base(name):
    function, stock = getattr(M, name), IN_PLACE[name][0]
    options = {} if name in MASKS else {"format": Dense()}
    results = []
    for fn, given in ((function, options), (stock, {})):
        x = torch.linspace(-2, 2, 24).requires_grad_()
        y = x * 1.0
        fn(y.view(2, 12)[:, 3:9], inplace=True, **given)
        (y * torch.arange(24)).sum().backward()
        results.append((y.detach(), x.grad))
    assert_same(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("function", [M.relu, M.silu, M.hardsigmoid])
def test_in_place_on_a_leaf_is_refused_as_torch_does(function):
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        function(x, inplace=True)


def test_in_place_spoils_what_another_layer_kept_and_torch_says_so():
    x = torch.randn(4, 8, requires_grad=True)
    y = x * 1.0
    z = y.exp()
    M.relu(z, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("format", [Quantized(4), Dense()], ids=str)
def test_in_place_compiled_as_one_graph(name, format):
    torch._dynamo.reset()
    values = torch.randn(4, 40)
    format = None if name in MASKS else format
    fn = in_place(getattr(M, name), format, **IN_PLACE[name][1])
    out, (grad,), _ = run(fn, [values])
    compiled, (compiled_grad,), _ = run(
        torch.compile(fn, fullgraph=True, backend="aot_eager"), [values]
    )
    assert_same(compiled, out)
    if format is not None and format.exact:  # compiled code takes it of x
        torch.testing.assert_close(compiled_grad, grad)
    else:
        assert_same(compiled_grad, grad)
