"""query_attention and its gradient in Triton's interpreter; test_interpreter.py runs this file."""

import math

import pytest
import torch

import memtl
from memtl.kernels import OPS
from tests.kernels.query_attention_cases import (
    DTYPES,
    SIZES,
    backward,
    compare,
    draw,
    forward,
    masks,
    operands,
)


def test_triton_serves():
    for op in ("query_attention", "query_attention_grad"):
        assert memtl.backends.owner(op, "cpu") == "triton"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype):
    compare(*operands(size, dtype), None, 0.3, dtype)


@pytest.mark.parametrize("jacobian", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, jacobian):
    compare(*operands((2, 1, 3, 37, 20, 24), dtype), None, 0.3, jacobian)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_masks(dtype):
    size = (2, 2, 3, 37, 8, 8)
    for mask in masks(size):
        compare(*operands(size, dtype), mask.to(dtype), -0.3, torch.float32)
        compare(*operands(size, dtype), mask.float(), 0.3)


def test_a_query_without_keys_gets_zeros():
    _, q, k, v = operands((2, 2, 3, 37, 8, 8))
    mask = torch.full((2, 1, 37), -math.inf)
    for t in (*forward(q, k, v, mask, 0.3, torch.float32), backward(q, q, k, v, mask, 0.3)):
        assert torch.equal(t, torch.zeros_like(t))


def test_queries_of_every_sample():
    compare(*operands((3, 2, 4, 19, 8, 8), shared=True), None, 0.3, torch.float32)
    compare(*operands((0, 2, 4, 19, 8, 8), shared=True), None, 0.3, torch.float32)


def test_strides():
    tokens = draw(2, 21, 3, 2, 16).float()  # B, N, three of them, H, d
    q, k, v = (t.transpose(1, 2) for t in tokens.unbind(2))
    grad_out = draw(2, 2, 16, 5, seed=1).float().transpose(2, 3)
    mask = draw(21, 2, 1, seed=2).float().permute(1, 2, 0)
    assert not any(t.is_contiguous() for t in (q, k, v, grad_out, mask))
    compare(grad_out, q[:, :, ::5], k, v, mask, 0.3, torch.float32)
    every_other = draw(2, 2, 7, 16).float()[..., ::2]
    k, v = k[..., ::2], v[..., ::2]
    compare(every_other, every_other, k, v, mask[:1], 0.3, torch.float32)
    one = draw(2, 1, 1, 16).float().expand(2, 2, 7, 16)
    compare(one, one, one, one, mask[..., ::3].expand(2, 2, 7), 0.3, torch.float32)


def test_keys_and_values_far_from_zero():
    grad_out, q, k, v = operands((1, 2, 3, 37, 20, 24))
    compare(grad_out, 1e-3 * q, k + 1000, v - 1000, None, 0.3, torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("low", (-20.0, -80.0, -95.0, -800.0))
def test_keys_whose_weight_vanishes(low, dtype):
    *tensors, k, v = operands((1, 2, 3, 80, 8, 8), dtype)
    for order in (slice(None), slice(None, None, -1)):
        mask = torch.zeros(1, 1, 80, dtype=dtype)
        mask[..., 32:] = low
        compare(*tensors, k, v, mask[..., range(80)[order]], 0.3, dtype)


def test_what_is_not_finite_is_not_hidden():
    _, q, k, v = operands((1, 1, 2, 20, 8, 8))
    k[0, 0, 7, 3] = math.nan
    for t in (*forward(q, k, v, None, 0.3, torch.float32), backward(q, q, k, v, None, 0.3)):
        assert t.isnan().all()


def test_arguments_that_do_not_fit():
    grad_out, q, k, v = operands((2, 1, 3, 5, 8, 4))
    with pytest.raises(RuntimeError, match="query_attention: expected q .B or 1, H, T, d."):
        forward(q, k, v[:, :, 1:], None, 0.3, None)
    with pytest.raises(RuntimeError, match="query_attention_grad: expected grad_out .* got"):
        backward(grad_out[:, :, 1:], q, k, v, None, 0.3)
    with pytest.raises(RuntimeError, match="query_attention: expected mask"):
        forward(q, k, v, torch.zeros(2, 1, 4), 0.3, None)
    with pytest.raises(TypeError, match="one dtype"):
        forward(q, k.half(), v, None, 0.3, None)
    with pytest.raises(TypeError, match="jacobian must be floating point"):
        forward(q, k, v, None, 0.3, torch.int32)
    with pytest.raises(ValueError, match="one device, got .* v on meta"):
        OPS["query_attention"](q, k, v.to("meta"), None, 0.3, None)
    with pytest.raises(ValueError, match="one device, got grad_out on meta"):
        OPS["query_attention_grad"](grad_out.to("meta"), q, k, v, None, 0.3)


def test_opcheck():
    grad_out, q, k, v = operands((2, 1, 3, 5, 8, 4), shared=True)
    mask = draw(1, 1, 5)
    torch.library.opcheck(forward, (q, k, v, None, 0.3, None))
    torch.library.opcheck(forward, (q, k, v, mask, 0.3, torch.bfloat16))
    torch.library.opcheck(backward, (grad_out, q, k, v, mask, 0.3))


@pytest.mark.parametrize("keep", ("jacobian", "kv"))
def test_gradcheck(keep):
    _, q, k, v = operands((2, 1, 3, 5, 8, 4), torch.float64, shared=True)
    f = memtl.functional.query_attention
    assert torch.autograd.gradcheck(lambda q: f(q, k, v, keep=keep), q.requires_grad_())
