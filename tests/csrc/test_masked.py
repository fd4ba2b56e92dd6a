"""The C++ kernels of masked linear layers, every instruction set, against float64 products."""

import math

import pytest
import torch

import memtl  # noqa: F401  (defines and registers the operators)
from memtl import _ops, reference
from tests.helpers import assert_same, assert_within, gamma, unit

pytestmark = pytest.mark.usefixtures("isa")
ops = torch.ops.memtl

# tokens, outputs, inputs: one and several tiles of tokens, blocks of 128 and of 64, panels, bands
SIZES = ((1, 1, 1), (197, 70, 300), (64, 130, 65), (33, 3, 1100), (70, 600, 30), (5, 3200, 9))


def draw(tokens, outputs, inputs, dtype=torch.float32, density=0.1, seed=0):
    """x, grad_out, weight, bias; the mask as a float64 factor and as bits."""
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, inputs), (tokens, outputs), (outputs, inputs), (outputs,)
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    kept = torch.rand(outputs, inputs, generator=g) < density
    return *tensors, kept.double(), reference.bits_pack(kept)


def check(x, grad_out, weight, bias, kept, mask):
    """All three operators, within what adding up may err; returns what they gave."""
    exact = [t.double() for t in (x, grad_out, weight * kept, bias)]
    sizes = [t.abs() for t in exact]
    calls = (
        (ops.masked_linear(x, weight, mask, bias), lambda x, g, w, b: x @ w.T + b),
        (ops.masked_linear(x, weight, mask, None), lambda x, g, w, b: x @ w.T),
        (ops.masked_linear_input_grad(grad_out, weight, mask), lambda x, g, w, b: g @ w),
        (ops.masked_linear_weight_grad(grad_out, x, mask), lambda x, g, w, b: g.T @ x * kept),
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    terms = max(*x.shape, *weight.shape) + 20
    for got, product in calls:
        assert got.dtype == (wide if got is calls[-1][0] else x.dtype) and got.is_contiguous()
        expected = product(*exact)
        bound = 2 * gamma(terms, wide) * product(*sizes)  # float64's product errs as well
        if got.dtype != wide:
            bound = bound + unit(got.dtype) * expected.abs() + 2.0**-25  # below float16's normal
        assert_within(got, expected, bound)
    return [got for got, _ in calls]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size):
    check(*draw(*size))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.35, 0.9, 1.0])
@pytest.mark.parametrize("dtype", _ops.FLOATING)
def test_any_density_and_dtype(dtype, density):
    check(*draw(150, 40, 200, dtype, density))


def test_dtypes_may_differ():
    x, _, weight, bias, kept, mask = draw(20, 30, 50)
    for dtype in _ops.FLOATING:
        got = ops.masked_linear(x, weight.to(dtype), mask, bias.bfloat16())
        expected = x.double() @ (weight.to(dtype) * kept).T + bias.bfloat16()
        assert got.dtype == torch.float32
        assert_within(got, expected, 1e-4)


def test_any_layout():
    x, grad_out, weight, bias, _, mask = draw(70, 33, 130)
    spread = torch.empty(2 * len(mask), dtype=torch.uint8)
    spread[::2] = mask
    strided = x.T.contiguous().T, grad_out.T.contiguous().T, weight.T.contiguous().T
    a, g, w = strided
    assert_same(
        ops.masked_linear(a, w, spread[::2], bias), ops.masked_linear(x, weight, mask, bias)
    )
    assert_same(
        ops.masked_linear_input_grad(g, w, spread[::2]),
        ops.masked_linear_input_grad(grad_out, weight, mask),
    )
    assert_same(
        ops.masked_linear_weight_grad(g, a, spread[::2]),
        ops.masked_linear_weight_grad(grad_out, x, mask),
    )


def test_no_result_depends_on_threads():
    arguments = draw(100, 300, 1100, density=0.05)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(check(*arguments))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_what_is_pruned_is_not_read_and_what_is_not_finite_shows(density):
    x, grad_out, weight, _, kept, mask = draw(9, 20, 30, density=density)
    clean = ops.masked_linear(x, weight, mask, None)
    spoilt = torch.where(kept == 1, weight, math.nan)
    assert_same(ops.masked_linear(x, spoilt, mask, None), clean)
    o, i = kept.nonzero()[3].tolist()
    spoilt[o, i] = math.inf
    assert ops.masked_linear(x, spoilt, mask, None)[:, o].isinf().all()
    assert ops.masked_linear_input_grad(grad_out, spoilt, mask)[:, i].isinf().all()
    grad_out[2, o] = math.nan
    weight_grad = ops.masked_linear_weight_grad(grad_out, x, mask)
    assert torch.equal(weight_grad[o].isnan(), kept[o] == 1)


def test_wrong_arguments():
    x, grad_out, weight, bias, _, mask = draw(4, 5, 6)
    for match, call in (
        (r"expected x \[T, 6\]", lambda: ops.masked_linear(x[:, 1:], weight, mask, None)),
        (r"expected x \[T, I\]", lambda: ops.masked_linear(x[0], weight, mask, None)),
        (r"expected weight \[O, I\]", lambda: ops.masked_linear(x, weight[0], mask, None)),
        (r"expected bias \[5\]", lambda: ops.masked_linear(x, weight, mask, bias[1:])),
        ("needs 4 bytes", lambda: ops.masked_linear(x, weight, mask[1:], None)),
        ("mask of uint8", lambda: ops.masked_linear(x, weight, mask.int(), None)),
        ("expected x in float32", lambda: ops.masked_linear(x.int(), weight, mask, None)),
        (r"expected grad_out \[T, 5\]", lambda: ops.masked_linear_input_grad(x, weight, mask)),
        (r"grad_out \[T, O\] and x", lambda: ops.masked_linear_weight_grad(grad_out[1:], x, mask)),
        ("of one dtype", lambda: ops.masked_linear_weight_grad(grad_out.half(), x, mask)),
        ("needs 4 bytes", lambda: ops.masked_linear_weight_grad(grad_out, x, mask[1:])),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()
