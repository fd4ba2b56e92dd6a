"""On an NVIDIA GPU: query_attention and its gradient, by whoever serves them and by Triton."""

import math

import pytest
import torch

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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Of a vision transformer, more queries than a program takes, more features than a tile.
LARGE = ((2, 3, 10, 197, 64, 64), (1, 2, 35, 100, 128, 64), (1, 1, 3, 1025, 256, 256))


@pytest.fixture(params=("registered", "triton"))
def ops(request):
    """Both operators, of operands on the CPU."""
    if request.param == "registered":
        pair = forward, backward
    else:
        kernels = pytest.importorskip("memtl.kernels")
        pair = kernels.OPS["query_attention"], kernels.OPS["query_attention_grad"]

    def on_gpu(op):
        return lambda *a: op(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in a))

    return tuple(map(on_gpu, pair))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES + LARGE, ids=str)
def test_sizes(ops, size, dtype):
    compare(*operands(size, dtype), None, 0.125, torch.float32, ops)


@pytest.mark.parametrize("jacobian", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(ops, dtype, jacobian):
    compare(*operands((2, 1, 3, 37, 20, 24), dtype, shared=True), None, 0.3, jacobian, ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(ops, dtype):
    size = (2, 3, 3, 37, 64, 64)
    for mask in masks(size):
        compare(*operands(size, dtype), mask.to(dtype), -0.125, torch.float32, ops)
        compare(*operands(size, dtype), mask.float(), 0.125, torch.float32, ops)


def test_strides(ops):
    tokens = draw(2, 21, 3, 2, 64).float()  # B, N, three of them, H, d
    q, k, v = (t.transpose(1, 2) for t in tokens.unbind(2))
    grad_out = draw(2, 2, 64, 21, seed=1).float().transpose(2, 3)
    compare(grad_out, q, k, v, None, 0.125, torch.float32, ops)


def test_keys_and_values_far_from_zero(ops):
    grad_out, q, k, v = operands((1, 2, 3, 37, 64, 64))
    compare(grad_out, 1e-3 * q, k + 1000, v - 1000, None, 0.125, torch.float32, ops)


@pytest.mark.parametrize("low", (-80.0, -95.0, -800.0))
def test_keys_whose_weight_vanishes(ops, low):
    tensors = operands((1, 2, 3, 80, 64, 64))
    mask = torch.zeros(1, 1, 80)
    for part in (slice(32, None), slice(None, 32)):
        compare(*tensors, mask.index_fill(2, torch.arange(80)[part], low), 0.1, torch.float32, ops)


@pytest.mark.slow
def test_beyond_32_bit_offsets():
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    memory = torch.zeros(3 * 2**30 + 64, dtype=torch.float16, device="cuda")
    far = memory.as_strided((1, 1, 4, 64), (0, 0, 2**30, 1))
    far.copy_(draw(1, 1, 4, 64))
    near, q = far.contiguous(), draw(1, 1, 3, 64, seed=1).half().cuda()
    scale = 1 / math.sqrt(64)
    for op, *arguments in ((forward, None, scale, torch.float32), (forward, None, scale, None)):
        for a, e in zip(op(q, far, far, *arguments), op(q, near, near, *arguments), strict=True):
            assert torch.equal(a, e)
    actual, expected = (backward(q, q, keys, keys, None, scale) for keys in (far, near))
    assert torch.equal(actual, expected)
