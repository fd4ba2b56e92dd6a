"""linear and matmul: what the gradients are made of, and what is kept."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from memtl import functional as M
from memtl.memory import saved_bytes
from memtl.storage import CenteredTopK, Dense, Quantized, TopK, pack
from tests.helpers import (
    FORMATS,
    LOSSY,
    assert_same,
    assert_within,
    cosine,
    gamma,
    grad_like,
    leaves,
    summed,
)

EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
EVERY_LOSSY = pytest.mark.parametrize("format", LOSSY.values(), ids=LOSSY)


@EVERY_FORMAT
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradient_is_taken_from_the_unpacked_input(format, transposed):
    x = torch.randn(3, 5, 300, requires_grad=True)
    weight = torch.randn(300, 7) if transposed else torch.randn(7, 300)
    weight.requires_grad_()
    out = M.linear(x, weight, torch.zeros(7), format=format, transposed=transposed)
    g = grad_like(out)
    out.backward(g)
    packed = pack(x.detach(), format)
    stored = packed.unpack().reshape(-1, 300).double()
    rows = g.reshape(-1, 7).double()
    expected, magnitude = rows.T @ stored, rows.T.abs() @ summed(packed).view(-1, 300)
    if transposed:
        expected, magnitude = expected.T, magnitude.T
    assert_within(weight.grad, expected, gamma(rows.shape[0] + 2) * magnitude)


@EVERY_FORMAT
def test_bytes(format):
    x, weight, bias = torch.randn(4, 9, 300), torch.randn(50, 300), torch.randn(50)
    kept = format.nbytes(x.shape, x.dtype)
    own = 4 * weight.numel()  # kept by reference for the gradient of x; a model's weight is free

    def bytes_when(*needs):
        tensors = leaves((x, weight, bias), needs)
        return saved_bytes(lambda: M.linear(*tensors, format=format))

    assert bytes_when(True, True, True) == kept + own
    assert bytes_when(False, True, True) == kept
    assert bytes_when(True, False, True) == own
    assert bytes_when(False, False, True) == 0


def test_bytes_of_the_default_format_at_ten_percent():
    x = torch.randn(10, 512, requires_grad=True)
    weight = torch.randn(8, 512, requires_grad=True)
    # 26 values and positions of one byte in each block of 256, and a scale of two bytes.
    assert saved_bytes(lambda: M.linear(x.detach(), weight)) == 10 * 2 * (26 + 26 + 2)


@EVERY_LOSSY
def test_autocast_keeps_no_second_copy_of_the_weight(format):
    x = torch.randn(6, 256, requires_grad=True)
    weight = torch.randn(40, 256, requires_grad=True)
    bias = torch.randn(40, requires_grad=True)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return M.linear(x, weight, bias, format=format)

    kept = format.nbytes(x.shape, torch.bfloat16)
    assert saved_bytes(forward) == kept + 4 * weight.numel()
    out = forward()
    assert out.dtype == torch.bfloat16
    g = grad_like(out)
    out.backward(g)
    assert weight.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32
    packed = pack(x.detach().bfloat16(), format)
    # Top-k's product reads float32 values; the others unpack to the dtype of grad_out first.
    topk = isinstance(format, (TopK, CenteredTopK))
    stored = packed.unpack(torch.float32 if topk else None).double()
    bound = gamma(9) * g.double().T.abs() @ summed(packed)
    if not topk:  # the product is computed in bfloat16
        bound = bound + 2**-8 * (g.double().T @ stored).abs()
    assert_within(weight.grad, g.double().T @ stored, bound)


def test_weight_gradient_under_top_k_is_float32_whatever_surrounds_backward():
    """Backward inside an autocast region must not round the product to bfloat16."""
    x = torch.randn(64, 256)
    weight = torch.randn(16, 256, requires_grad=True)
    out = M.linear(x, weight, format=TopK(0.1, values="fp32"))
    g = grad_like(out)
    with torch.autocast("cpu", torch.bfloat16):
        out.backward(g)
    stored = pack(x, TopK(0.1, values="fp32")).unpack().double()
    bound = gamma(66) * g.double().T.abs() @ stored.abs()
    assert_within(weight.grad, g.double().T @ stored, bound)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
def test_inputs_of_any_layout(layout):
    x = {
        "transposed": lambda: torch.randn(300, 6).T,
        "sliced": lambda: torch.randn(6, 600)[:, ::2],
        "expanded": lambda: torch.randn(1, 300).expand(6, 300),
        "channels_last": lambda: (
            torch.randn(2, 300, 3, 4)
            .to(memory_format=torch.channels_last)
            .permute(0, 2, 3, 1)[0, :2, :3]
        ),
    }[layout]()
    weight = torch.randn(5, 300)
    results = []
    for given in (x, x.contiguous()):
        a, w = given.detach().requires_grad_(), weight.clone().requires_grad_()
        out = M.linear(a, w, format=TopK(0.1))
        out.backward(grad_like(out))
        results.append((out.detach(), w.grad, a.grad))
    for strided, plain in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-5, atol=1e-5)
    assert_same(pack(x, TopK(0.1)).unpack(), pack(x.contiguous(), TopK(0.1)).unpack())


def test_a_gradient_without_strides():
    """sum().backward() hands out one number expanded to every element."""
    x, weight = torch.randn(4, 300), torch.randn(5, 300, requires_grad=True)
    M.linear(x, weight, format=TopK(0.1, values="fp32")).sum().backward()
    expected = pack(x, TopK(0.1, values="fp32")).unpack().sum(0).expand(5, 300)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_transposed_without_bias_is_a_product():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    out = M.linear(x, weight, transposed=True, format=Dense())
    assert_same(out.detach(), torch.addmm(torch.zeros(3), x.detach(), weight.detach()))
    out.backward(grad_like(out))
    torch.testing.assert_close(weight.grad, x.detach().T @ grad_like(out))


def test_a_weight_used_twice_gets_both_gradients():
    x, weight = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)
    format = TopK(0.5)
    first = M.linear(x, weight, format=format)
    second = M.linear(first, weight, format=format)
    second.backward(grad_like(second))
    g = grad_like(second)
    outer = pack(first.detach(), format).weight_grad(g)
    inner = pack(x, format).weight_grad(g @ weight.detach())
    torch.testing.assert_close(weight.grad, outer + inner, rtol=1e-5, atol=1e-5)


def test_an_input_changed_in_place_is_noticed_or_harmless():
    weight = torch.randn(5, 8, requires_grad=True)
    x = torch.randn(4, 8)
    expected = pack(x.clone(), TopK(0.5)).weight_grad(torch.ones(4, 5))
    out = M.linear(x, weight, format=TopK(0.5))
    x.zero_()
    out.sum().backward()
    assert_same(weight.grad, expected)  # a packed copy does not change with it
    out = M.linear(x, weight, format=Dense())
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_func_grad():
    x, weight, bias = torch.randn(4, 64), torch.randn(5, 64), torch.randn(5)

    def loss(weight, bias, linear):
        return linear(x, weight, bias).square().sum()

    got = torch.func.grad(loss, (0, 1))(weight, bias, lambda *t: M.linear(*t, format=Dense()))
    expected = torch.func.grad(loss, (0, 1))(weight, bias, F.linear)
    for ours, stock in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, stock)
    lossy = torch.func.grad(loss)(weight, bias, lambda *t: M.linear(*t, format=TopK(0.2)))
    assert not torch.equal(lossy, expected[0]) and lossy.isfinite().all()


def test_a_gradient_penalty_is_refused_not_ignored():
    """Its term must not vanish silently beside the rest of the loss."""
    x, weight = leaves((torch.randn(4, 8), torch.randn(5, 8)))
    loss = M.linear(x, weight, format=Dense()).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (loss + grad.square().sum()).backward()


def test_compiled_for_any_batch_size():
    torch._dynamo.reset()
    weight = torch.randn(5, 300, requires_grad=True)
    compiled = torch.compile(
        lambda x: M.linear(x, weight), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch in (3, 8, 21):
        x = torch.randn(batch, 300)
        g = torch.randn(batch, 5)
        grads = []
        for fn in (compiled, lambda x: M.linear(x, weight)):
            weight.grad = None
            fn(x).backward(g)
            grads.append(weight.grad)
        assert_same(*grads)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor():
    torch._dynamo.reset()

    def block(x, w1, b1, w2):
        hidden = M.gelu(M.linear(M.layer_norm(x, (64,)), w1, b1))
        return x + M.linear(hidden, w2)

    tensors = torch.randn(4, 64), torch.randn(96, 64), torch.randn(96), torch.randn(64, 96)
    results = []
    for fn in (torch.compile(block, fullgraph=True), block):
        inputs = leaves(tensors)
        out = fn(*inputs)
        out.backward(grad_like(out))
        results.append([out.detach(), *(t.grad for t in inputs)])
    compiled, eager = results
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-4, atol=1e-4)
    # Inductor rounds x-hat in its own way, and any changed bit draws other dither for its group.
    for ours, expected in zip(compiled[1:], eager[1:], strict=True):
        assert cosine(ours, expected) > 0.97


@EVERY_FORMAT
def test_matmul_gradients_are_taken_from_the_unpacked_partner(format):
    a, b = leaves((torch.randn(2, 3, 6, 40), torch.randn(2, 3, 40, 5)))
    out = M.matmul(a, b, format=format)
    g = grad_like(out)
    out.backward(g)
    assert_same(a.grad, g @ pack(b.detach(), format).unpack().transpose(-2, -1))
    assert_same(b.grad, pack(a.detach(), format).unpack().transpose(-2, -1) @ g)


def test_matmul_bytes():
    a, b = torch.randn(2, 24, 64), torch.randn(2, 64, 32)
    four = Quantized(4)
    bytes_a, bytes_b = (four.nbytes(t.shape, t.dtype) for t in (a, b))
    assert saved_bytes(M.matmul, *leaves((a, b))) == bytes_a + bytes_b
    assert saved_bytes(M.matmul, *leaves((a, b), [True, False])) == bytes_b
    assert saved_bytes(M.matmul, *leaves((a, b), [False, True])) == bytes_a


def test_small_operands_of_a_large_product_get_twice_the_bits():
    a, b = torch.randn(2, 64, 16), torch.randn(2, 16, 64)  # queries and keys of few features
    eight = Quantized(8).nbytes(a.shape, a.dtype)
    assert saved_bytes(M.matmul, *leaves((a, b))) == 2 * eight
    values = torch.randn(2, 64, 16)
    kept = Quantized(4).nbytes(torch.Size((2, 64, 64)), a.dtype) + eight
    assert saved_bytes(M.matmul, *leaves((torch.randn(2, 64, 64), values))) == kept


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((5,), (5, 3)), ((4, 5), (5,))])
def test_matmul_with_a_vector_is_torch(shapes):
    a, b = leaves([torch.randn(shape) for shape in shapes])
    out = M.matmul(a, b)
    out.backward(grad_like(out))
    x, y = leaves((a, b))
    expected = torch.matmul(x, y)
    expected.backward(grad_like(out))
    assert_same(out.detach(), expected.detach())
    assert_same(a.grad, x.grad)
    assert_same(b.grad, y.grad)
