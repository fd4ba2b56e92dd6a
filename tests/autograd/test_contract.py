"""What every function of memtl.functional promises, over the table in cases.py."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from memtl import functional
from memtl.memory import saved_bytes
from memtl.storage import Dense, Quantized, TopK
from tests.autograd.cases import CASES
from tests.helpers import (
    FORMATS,
    LOSSY,
    assert_same,
    assert_within,
    cosine,
    grad_like,
    leaves,
    run,
)

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FORMATTED = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.formats], ids=[n for n, c in CASES.items() if c.formats]
)
FLOAT32_INSIDE = (CASES["rms_norm-llama"], CASES["rms_norm-gemma"], CASES["softmax-middle"])
# Of these torch rounds a constant to float32.
FLOAT32_CONSTANT = (CASES["celu"], CASES["hardsigmoid"])
PRODUCTS = ("matmul", "scaled_dot_product_attention", "mul", "addcmul", "einsum", "baddbmm")
FOUR = Quantized(4)
# Rounding when the same sum is taken in another order, for the sizes in the table.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 8e-3}


def bind(case, format):
    return lambda *tensors: case.ours(format, *tensors)


def close(actual, expected, dtype):
    """Equal up to rounding, relative to the largest entry."""
    assert actual.dtype == expected.dtype
    if expected.numel():
        assert_within(actual, expected, TOLERANCE[dtype] * expected.double().abs().max())


def test_every_public_function_is_in_the_table():
    several_processes = {"sync_batch_norm"}  # see test_channel_norm.py
    one_gradient = {"query_attention"}  # see test_query_attention.py
    of_masks = {"Threshold", "count_bits", "magnitude_masks", "magnitude_threshold"}  # no gradient
    elsewhere = several_processes | one_gradient | of_masks
    assert {case.function for case in CASES.values()} == set(functional.__all__) - elsewhere


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_is_stock_bit_for_bit_and_draws_the_same_random_numbers(case, dtype):
    if case.function == "avg_pool3d" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("torch has none")
    tensors = case.tensors(dtype)
    expected, _, state = run(case.stock, tensors)
    for format in (FOUR, TopK(0.1), Dense()) if case.formats else (None,):
        out, grads, own_state = run(bind(case, format), tensors)
        assert_same(out, expected)
        assert_same(own_state, state)
        for t, grad in zip(tensors, grads, strict=True):
            assert grad.dtype == t.dtype and grad.shape == t.shape


@EVERY
def test_forward_is_stock_under_autocast(case):
    tensors = case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        expected, stock_grads, state = run(case.stock, tensors)
        out, grads, own_state = run(bind(case, FOUR), tensors)
    assert_same(out, expected)
    assert_same(own_state, state)
    for ours, stock, exact in zip(grads, stock_grads, case.exact, strict=True):
        assert ours.dtype == stock.dtype == torch.float32
        if exact:
            close(ours, stock, torch.bfloat16)
        else:
            assert cosine(ours, stock) > 0.9


@EVERY
def test_backward_outside_autocast_hands_out_float32_gradients(case):
    inputs = leaves(case.tensors())
    with torch.autocast("cpu", torch.bfloat16):
        out = case.ours(FOUR, *inputs)
    out.backward(grad_like(out))
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in inputs)


@EVERY
def test_forward_is_stock_when_nothing_needs_a_gradient(case):
    tensors = [t.detach() for t in case.tensors()]
    torch.manual_seed(0)
    expected = case.stock(*tensors)
    torch.manual_seed(0)
    out = case.ours(FOUR, *tensors)
    assert_same(out, expected)
    assert not out.requires_grad


@EVERY
def test_gradients_under_an_exact_format_are_stock_up_to_rounding(case):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = case.tensors(dtype)
        if dtype == torch.float64 and case in FLOAT32_INSIDE + FLOAT32_CONSTANT:
            continue
        if dtype == torch.bfloat16 and case.function == "avg_pool3d":
            continue  # torch has none
        _, expected, _ = run(case.stock, tensors)
        _, grads, _ = run(bind(case, Dense()), tensors)
        for ours, stock in zip(grads, expected, strict=True):
            close(ours, stock, dtype)


@EVERY
def test_gradients_that_need_no_stored_activation_are_exact_under_every_format(case):
    tensors = case.tensors()
    _, expected, _ = run(case.stock, tensors)
    for format in FORMATS.values() if case.formats else (None,):
        _, grads, _ = run(bind(case, format), tensors)
        for ours, stock, exact in zip(grads, expected, case.exact, strict=True):
            if exact:
                close(ours, stock, torch.float32)


@FORMATTED
@pytest.mark.parametrize("bits, bound", [(8, 0.999), (4, 0.9)])
def test_gradients_under_few_bits_point_the_same_way(case, bits, bound):
    """Loose: at 4 bits a step is range / 15, some 0.3 standard deviations of Gaussian data."""
    tensors = case.tensors()
    _, expected, _ = run(case.stock, tensors)
    _, grads, _ = run(bind(case, Quantized(bits)), tensors)
    for ours, stock in zip(grads, expected, strict=True):
        assert cosine(ours, stock) > bound


@EVERY
def test_gradcheck(case):
    if case in FLOAT32_INSIDE:
        pytest.skip("computes in float32")
    small = {43: 7, 300: 20, 70: 10}
    tensors = [
        torch.randn([small.get(n, n) for n in shape], dtype=torch.float64) for shape in case.shapes
    ]
    if case.function in ("layer_norm", "rms_norm"):
        tensors = case.tensors(torch.float64)
    if case.function == "relu":  # away from the kink
        tensors = [t + 0.1 * t.sign() for t in tensors]

    def seeded(*inputs):
        torch.manual_seed(3)
        return case.ours(Dense(), *inputs)

    assert gradcheck(seeded, leaves(tensors), fast_mode=True)


@EVERY
def test_two_backward_passes_accumulate(case):
    tensors = case.tensors()
    inputs = leaves(tensors)
    for seed in (0, 1):
        torch.manual_seed(seed)
        out = case.ours(FOUR, *inputs)
        out.backward(grad_like(out))
    _, first, _ = run(bind(case, FOUR), tensors, seed=0)
    _, second, _ = run(bind(case, FOUR), tensors, seed=1)
    for t, a, b in zip(inputs, first, second, strict=True):
        assert_same(t.grad, a + b)


@EVERY
def test_retained_graph_gives_the_same_gradients_again(case):
    inputs = leaves(case.tensors())
    out = case.ours(FOUR, *inputs)
    first = torch.autograd.grad(out, inputs, grad_like(out), retain_graph=True)
    second = torch.autograd.grad(out, inputs, grad_like(out))
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)


@EVERY
def test_each_gradient_alone_is_the_one_of_all_together(case):
    tensors = case.tensors()
    _, together, _ = run(bind(case, FOUR), tensors)
    for i in range(len(tensors)):
        needs = [j == i for j in range(len(tensors))]
        _, alone, _ = run(bind(case, FOUR), tensors, needs)
        close(alone[i], together[i], torch.float32)
        assert all(g is None for j, g in enumerate(alone) if j != i)


@EVERY
def test_double_backward_is_refused_with_a_clear_error(case):
    inputs = leaves(case.tensors())
    out = case.ours(FOUR, *inputs)
    (grad,) = torch.autograd.grad(out, inputs[:1], grad_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@EVERY
def test_checkpointing_gives_the_same_gradients(case):
    tensors = case.tensors()
    expected, grads, _ = run(bind(case, FOUR), tensors)
    fn = bind(case, FOUR)
    out, checkpointed, _ = run(lambda *t: checkpoint(fn, *t, use_reentrant=False), tensors)
    assert_same(out, expected)
    for a, b in zip(checkpointed, grads, strict=True):
        assert_same(a, b)


@EVERY
def test_nothing_is_kept_when_no_gradient_is_wanted(case):
    tensors = case.tensors()
    with torch.no_grad():
        assert saved_bytes(case.ours, FOUR, *leaves(tensors)) == 0
    assert saved_bytes(case.ours, FOUR, *leaves(tensors, [False] * len(tensors))) == 0
    assert (saved_bytes(case.ours, FOUR, *leaves(tensors)) > 0) == case.keeps


@EVERY
def test_compiled_as_one_graph_equals_eager(case):
    """Random functions: see test_activation.py and test_attention.py."""
    if case.random:
        pytest.skip("compiled code draws other random numbers")
    torch._dynamo.reset()
    tensors = case.tensors()
    fn = bind(case, FOUR)
    expected, grads, _ = run(fn, tensors)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    out, compiled_grads, _ = run(compiled, tensors)
    assert_same(out, expected)
    for a, b in zip(compiled_grads, grads, strict=True):
        assert_same(a, b)
    if case is not CASES["max_pool2d-large"]:  # there torch's partitioner keeps int64, not float32
        assert saved_bytes(compiled, *leaves(tensors)) <= saved_bytes(fn, *leaves(tensors))


@FORMATTED
@pytest.mark.parametrize("format", LOSSY.values(), ids=LOSSY)
def test_every_format_gives_finite_gradients_of_the_right_shape(case, format):
    tensors = case.tensors()
    _, grads, _ = run(bind(case, format), tensors)
    for t, grad in zip(tensors, grads, strict=True):
        assert grad.shape == t.shape and grad.dtype == t.dtype
        assert grad.isfinite().all() and grad.abs().sum() > 0


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(case, bad):
    tensors = case.tensors()
    tensors[0].view(-1)[3] = bad
    _, stock, _ = run(case.stock, tensors)
    out, ours, _ = run(bind(case, FOUR), tensors)
    assert_same(out, run(case.stock, tensors)[0])
    for grad, expected in zip(ours, stock, strict=True):
        # Wherever stock's gradient is not finite, so is ours (a 4-bit group spoils its neighbours).
        assert not grad[~expected.isfinite()].isfinite().any()


@EVERY
def test_empty_batch(case):
    if len(case.shapes[0]) == 1 or not case.batch:
        pytest.skip("no batch dimension")
    batched = {case.shapes[0][0]}
    tensors = case.tensors()
    for i, t in enumerate(tensors):
        own = len(t.shape) == len(case.shapes[0]) and t.shape[0] in batched
        if own and (i == 0 or case.function in PRODUCTS):
            tensors[i] = t[:0]
    if case.function == "instance_norm":  # torch's own fails on it
        with pytest.raises(IndexError):
            run(case.stock, tensors)
        return
    _, expected, _ = run(case.stock, tensors)
    for format in (FOUR, TopK(0.1), TopK(0.1, scope="sample")) if case.formats else (None,):
        out, grads, _ = run(bind(case, format), tensors)
        assert out.numel() == 0
        for ours, stock in zip(grads, expected, strict=True):
            # An unused mask has no gradient in torch's attention; here it is zero.
            assert_same(ours, torch.zeros_like(ours) if stock is None else stock)


def bad_tensors(case):
    """(index, replacement, what the message names)"""
    x = case.tensors()[0]
    yield x.to(torch.int64), "int64"
    yield x.to(torch.complex64), "complex64"
    yield x.to_sparse(), "sparse"
    yield x.tolist(), "list"
    yield None, "NoneType"


@EVERY
def test_a_bad_tensor_is_named(case):
    tensors = case.tensors()
    for i in range(len(tensors)):
        for bad, name in bad_tensors(case):
            if bad is None and i > 0 and case.function not in ("matmul",):
                continue  # None is a legal weight, bias or mask
            if i == 3 and case.function == "scaled_dot_product_attention":
                continue  # the mask: see test_attention.py
            given = [bad if j == i else t for j, t in enumerate(tensors)]
            with pytest.raises(TypeError, match=name) as error:
                case.ours(FOUR, *given)
            assert case.function in str(error.value)


@FORMATTED
@pytest.mark.parametrize("bad", [None, "4-bit", 4, Quantized])
def test_a_bad_format_is_named(case, bad):
    with pytest.raises(TypeError, match=r"format must be a memtl\.storage\.Format, got"):
        case.ours(bad, *case.tensors())


@FORMATTED
def test_an_open_format_is_refused(case):
    with pytest.raises(ValueError, match="leaves `keep` open"):
        case.ours(TopK(), *case.tensors())


WRONG_SHAPES = {
    "linear": [[(2, 3), (4, 5)], [(2, 3), (3,)], [(), (3, 3)], [(2, 3), (4, 3), (5,)]],
    "conv2d": [
        [(2, 3, 8, 8), (4, 2, 2, 2)],
        [(2, 8, 8), (4, 8, 2, 2)],
        [(2, 3, 8, 8), (4, 12)],
        [(2, 3, 8, 8), (4, 3, 2, 2), (3,)],
    ],
    "conv_transpose2d": [[(2, 3, 8, 8), (4, 3, 2, 2)], [(2, 3, 8, 8), (3, 5, 2, 2), (3,)]],
    "batch_norm": [[(3,), (3,), (3,)], [(2, 3), (2,), (2,)]],
    "mul": [[(2, 3), (2, 4)]],
    "addcmul": [[(2, 3), (2, 3), (2, 4)]],
    "baddbmm": [[(2, 4, 4), (2, 3, 5), (2, 5, 4)]],
    "prelu": [[(2, 3), (2,)]],
    "max_pool2d": [[(2, 3)]],
    "avg_pool1d": [[(3,)]],
    "matmul": [[(2, 3), (4, 5)], [(2, 3, 4), (3, 4, 5)]],
    "scaled_dot_product_attention": [
        [(2, 3, 7, 8), (2, 3, 7, 6), (2, 3, 7, 8)],
        [(2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 7, 8)],
        [(8,), (8,), (8,)],
    ],
}


@pytest.mark.parametrize(
    "name, shapes", [(n, s) for n, group in WRONG_SHAPES.items() for s in group], ids=str
)
def test_shapes_that_do_not_fit_are_named(name, shapes):
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    arguments = (2,) if "pool" in name else ()
    with pytest.raises(ValueError, match=f"{name}: expected") as error:
        getattr(functional, name)(*tensors, *arguments)
    assert str(list(shapes[0])) in str(error.value)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_normalized_shapes_that_do_not_fit_are_named(name):
    x = torch.randn(4, 6, requires_grad=True)
    fn = getattr(functional, name)
    for shape in ((5,), (4, 5), (3, 4, 6), ()):
        with pytest.raises(ValueError, match=rf"{name}: expected .*\[4, 6\]"):
            fn(x, shape)
    with pytest.raises(ValueError, match=rf"{name}: expected"):
        fn(x, (6,), torch.randn(5, requires_grad=True))
