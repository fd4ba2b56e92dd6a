"""The masked family where Triton serves it; test_interpreter.py runs this file."""

import math

import pytest
import torch

import memtl
from memtl import reference
from tests.helpers import assert_within, gamma, unit

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = ((5, 7, 9), (40, 33, 130), (0, 5, 3), (3, 0, 4), (2, 4, 0))  # tokens, outputs, inputs
ops = torch.ops.memtl


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(outputs, inputs):
    return reference.bits_pack(draw(outputs, inputs, seed=9) > 0.5)


def compare(name, arguments, terms):
    """With the definition in float64; a sum errs by gamma of its magnitudes, the result by half a
    unit more, and what is masked in the weight's dtype is exact."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in arguments]
    sizes = [t.abs() if t is not None and t.is_floating_point() else t for t in wide]
    actual = getattr(ops, name)(*arguments)
    expected = getattr(reference, name)(*wide)
    assert actual.dtype == getattr(reference, name)(*arguments).dtype
    assert actual.is_contiguous()
    compute = torch.promote_types(arguments[0].dtype, torch.float32)
    bound = gamma(terms + 2, compute) * getattr(reference, name)(*sizes)
    assert_within(actual, expected, bound + 2 * unit(actual.dtype) * expected.abs())


def test_triton_serves():
    for name in ("masked_linear", "masked_linear_input_grad", "masked_linear_weight_grad"):
        assert memtl.backends.owner(name, "cpu") == "triton"


@pytest.mark.parametrize("weight_dtype", (torch.float32, None), ids=("float32 weight", "one dtype"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype, weight_dtype):
    for tokens, outputs, inputs in SIZES:
        x, grad_out = draw(tokens, inputs).to(dtype), draw(outputs, tokens, seed=1).to(dtype).t()
        weight, bias = draw(inputs, outputs, seed=2).t(), draw(outputs, seed=3)
        weight, bias = (t.to(weight_dtype or dtype) for t in (weight, bias))
        mask = mask_of(outputs, inputs)
        compare("masked_linear", (x, weight, mask, bias), inputs)
        compare("masked_linear", (x, weight, mask, None), inputs)
        compare("masked_linear_input_grad", (grad_out, weight, mask), outputs)
        compare("masked_linear_weight_grad", (grad_out, x, mask), tokens)


def test_what_is_pruned_is_not_read():
    x, weight, mask = draw(5, 9), draw(7, 9, seed=1), mask_of(7, 9)
    pruned = ~reference.bits.bits_unpack(mask, 63).view(7, 9)
    expected = ops.masked_linear(x, weight, mask, None)
    weight = weight.masked_fill(pruned, math.nan)
    assert torch.equal(ops.masked_linear(x, weight, mask, None), expected)
    assert ops.masked_linear_input_grad(draw(5, 7), weight, mask).isfinite().all()
    x[0] = math.nan
    grad = ops.masked_linear_weight_grad(draw(5, 7), x, mask)
    assert not grad[pruned].any() and grad[~pruned].isnan().all()


def test_arguments_that_do_not_fit():
    x, weight, mask = draw(5, 9), draw(7, 9), mask_of(7, 9)
    with pytest.raises(RuntimeError, match=r"masked_linear: expected x \[T, 9\], got \(5, 8\)"):
        ops.masked_linear(x[:, 1:], weight, mask, None)
    with pytest.raises(RuntimeError, match=r"expected bias \[7\], got \(1,\)"):
        ops.masked_linear(x, weight, mask, draw(1))
    with pytest.raises(RuntimeError, match=r"needs 8 bytes of mask, got 7"):
        ops.masked_linear_input_grad(draw(5, 7), weight, mask[1:])
    with pytest.raises(RuntimeError, match=r"expected grad_out \[T, 7\]"):
        ops.masked_linear_input_grad(draw(5, 9), weight, mask)
    with pytest.raises(TypeError, match="grad_out and x of one dtype"):
        ops.masked_linear_weight_grad(draw(5, 7).float(), x, mask)
    with pytest.raises(TypeError, match="uint8 mask"):
        ops.masked_linear_weight_grad(draw(5, 7), x, mask.int())


def test_opcheck():
    x, weight, mask = draw(5, 9).half(), draw(7, 9), mask_of(7, 9)
    torch.library.opcheck(ops.masked_linear, (x, weight, mask, draw(7)))
    torch.library.opcheck(ops.masked_linear_input_grad, (draw(5, 7), weight, mask))
    torch.library.opcheck(ops.masked_linear_weight_grad, (draw(5, 7), draw(5, 9), mask))
