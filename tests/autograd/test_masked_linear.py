"""linear with a mask of its weight: the dense layer of the masked weight, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import memtl
from memtl import functional as M
from memtl.functional.sparse import sparse_pays
from memtl.memory import saved_bytes
from memtl.storage import Dense, Quantized, TopK, pack
from tests.helpers import (
    FORMATS,
    assert_same,
    assert_within,
    gamma,
    grad_like,
    leaves,
    run,
    summed,
)

EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
OUTPUTS, FEATURES = 37, 300


def drawn(density=0.1, *lead, dtype=torch.float32):
    """x, weight, bias; the mask as bool and as bits. What is pruned is not zero."""
    lead = lead or (2, 9)
    x, weight, bias = (
        torch.randn(shape).to(dtype) for shape in ((*lead, FEATURES), (OUTPUTS, FEATURES), OUTPUTS)
    )
    kept = torch.rand(OUTPUTS, FEATURES) < density
    return (x, weight, bias), kept, torch.ops.memtl.bits_pack(kept)


def masked(mask, format=Dense()):
    return lambda x, weight, bias=None: M.linear(x, weight, bias, format=format, mask=mask)


def stock(kept):
    return lambda x, weight, bias=None: F.linear(x, weight * kept, bias)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lead", [(2, 9), (11,), (), (2, 0, 3)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_it_is_the_dense_layer_of_the_masked_weight(density, lead):
    tensors, kept, mask = drawn(density)
    tensors = (torch.randn(*lead, FEATURES), *tensors[1:])
    for given in (tensors, tensors[:2]):
        expected, wanted, _ = run(stock(kept), given)
        out, grads, _ = run(masked(mask), given)
        close(out, expected)
        for ours, theirs in zip(grads, wanted, strict=True):
            close(ours, theirs)
    assert (grads[1] != 0).logical_and(~kept).sum() == 0


def test_what_is_pruned_is_not_read():
    (x, weight, bias), kept, mask = drawn()
    expected = run(masked(mask), (x, weight, bias))
    spoilt = torch.where(kept, weight, torch.nan)
    found = run(masked(mask), (x, spoilt, bias))
    assert_same(found[0], expected[0])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert_same(ours, theirs)


@EVERY_FORMAT
def test_weight_gradient_is_taken_from_the_stored_input_and_masked(format):
    (x, weight, bias), kept, mask = drawn()
    out, (grad_x, grad_weight, _), _ = run(masked(mask, format), (x, weight, bias))
    g, packed = grad_like(out).reshape(-1, OUTPUTS).double(), pack(x, format)
    stored = packed.unpack(torch.float32).view(-1, FEATURES).double()
    bound = gamma(len(g) + 3) * (g.T.abs() @ summed(packed).view(-1, FEATURES))
    assert_within(grad_weight, (g.T @ stored) * kept, bound)
    close(grad_x, (g @ (weight * kept).double()).float().view(x.shape))


def test_gradcheck():
    torch.manual_seed(0)
    kept = torch.rand(5, 12) < 0.3
    mask = torch.ops.memtl.bits_pack(kept)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 12), (5, 12), (5,))]
    assert gradcheck(masked(mask), leaves(tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    tensors, kept, mask = drawn(dtype=dtype)
    expected, wanted, _ = run(stock(kept), [t.double() for t in tensors])
    out, grads, _ = run(masked(mask), tensors)
    assert out.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
    for ours, theirs in zip((out, *grads), (expected, *wanted), strict=True):
        assert ours.dtype == dtype
        assert_within(ours, theirs, tolerance * theirs.abs().max())


@EVERY_FORMAT
def test_bytes(format):
    (x, weight, bias), _, mask = drawn()
    kept, own = format.nbytes(x.shape, x.dtype), 4 * weight.numel()  # the weight, by reference

    def bytes_when(*needs):
        return saved_bytes(masked(mask, format), *leaves((x, weight, bias), needs))

    assert bytes_when(True, True, True) == kept + own + mask.numel()
    assert bytes_when(False, True, True) == kept + mask.numel()
    assert bytes_when(True, False, True) == own + mask.numel()
    assert bytes_when(False, False, True) == 0


class Sparse(nn.Linear):
    """A layer whose mask is a buffer."""

    def __init__(self, density: float = 0.1):
        super().__init__(FEATURES, OUTPUTS)
        kept = torch.rand(OUTPUTS, FEATURES) < density
        self.register_buffer("bits", torch.ops.memtl.bits_pack(kept))
        self.kept = kept

    def memtl_sparse_mask(self, input):
        return self.bits


def test_a_converted_layer_with_a_mask_keeps_its_input_and_no_more():
    layer, x = Sparse(), torch.randn(4, FEATURES, requires_grad=True)
    plain = nn.Linear(FEATURES, OUTPUTS)
    plain.load_state_dict({"weight": layer.weight * layer.kept, "bias": layer.bias})
    config = memtl.BackRazorConfig(keep=0.1)
    for module in (layer, plain):
        memtl.apply(module, config)
    assert saved_bytes(layer, x) == saved_bytes(plain, x)
    out, expected = layer(x), plain(x)
    close(out, expected)
    for y in (out, expected):
        y.backward(grad_like(y))
    close(layer.weight.grad, plain.weight.grad * layer.kept)


def test_under_autocast():
    (x, weight, bias), kept, mask = drawn()

    def narrow(fn):
        def call(*tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return fn(*tensors)

        return call

    expected, wanted, _ = run(narrow(stock(kept)), (x, weight, bias))
    out, grads, _ = run(narrow(masked(mask)), (x, weight, bias))
    assert out.dtype == torch.bfloat16
    assert_within(out, expected, 2e-2 * expected.abs().max().double())
    for ours, theirs in zip(grads, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert_within(ours, theirs, 2e-2 * theirs.abs().max().double())


@pytest.mark.parametrize("format", [Dense(), Quantized(4), TopK(0.1)], ids=str)
def test_compiled_as_one_graph_equals_eager(format):
    torch._dynamo.reset()
    tensors, _, mask = drawn()
    expected, grads, _ = run(masked(mask, format), tensors)
    compiled = torch.compile(masked(mask, format), fullgraph=True, backend="aot_eager")
    out, found, _ = run(compiled, tensors)
    assert_same(out, expected)
    for a, b in zip(found, grads, strict=True):
        assert_same(a, b)


def test_compiled_for_any_batch_size():
    torch._dynamo.reset()
    (_, weight, _), _, mask = drawn()
    weight.requires_grad_()
    compiled = torch.compile(masked(mask), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 8, 21):
        x, g = torch.randn(batch, FEATURES), torch.randn(batch, OUTPUTS)
        grads = [torch.autograd.grad(f(x, weight), weight, g)[0] for f in (compiled, masked(mask))]
        assert_same(*grads)


def test_checkpointing_and_accumulation():
    tensors, _, mask = drawn()
    fn = masked(mask, TopK(0.1))
    expected, grads, _ = run(fn, tensors)
    out, again, _ = run(lambda *t: checkpoint(fn, *t, use_reentrant=False), tensors)
    assert_same(out, expected)
    inputs = leaves(tensors)
    for _ in range(2):
        out = fn(*inputs)
        out.backward(grad_like(out))
    for a, b, t in zip(again, grads, inputs, strict=True):
        assert_same(a, b)
        assert_same(t.grad, b + b)


def test_a_second_derivative_is_refused():
    tensors, _, mask = drawn()
    x, weight, bias = leaves(tensors)
    out = masked(mask)(x, weight, bias)
    (grad,) = torch.autograd.grad(out, x, grad_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_a_mask_changed_before_backward_is_noticed():
    tensors, _, mask = drawn()
    out = masked(mask)(*leaves(tensors))
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_does_not_fit_is_refused():
    (x, weight, bias), kept, mask = drawn()
    for bad, error, message in (
        (kept, TypeError, "mask must be a uint8 tensor of bits, got torch.bool"),
        ([1, 2], TypeError, "mask must be a uint8 tensor of bits, got list"),
        (mask[1:], ValueError, r"expected mask \[1388\] .* got \[1387\]"),
        (mask.view(4, -1), ValueError, r"expected mask \[1388\]"),
    ):
        with pytest.raises(error, match=message):
            M.linear(x, weight, bias, mask=bad)
    with pytest.raises(ValueError, match="transposed"):
        M.linear(x, weight.T, bias, transposed=True, mask=mask)


def test_the_rule_of_when_it_pays():
    assert sparse_pays(0.05, 1576) and sparse_pays(0.1, 1576)
    assert sparse_pays(0.1, 1576, torch.bfloat16) and not sparse_pays(0.2, 1576, torch.bfloat16)
    assert not sparse_pays(1.0, 1576) and not sparse_pays(0.1, 8)
    assert not sparse_pays(0.05, 1576, torch.float64)
    assert not sparse_pays(0.05, 1576, device="cuda")
    with pytest.raises(ValueError, match="density"):
        sparse_pays(1.5, 10)
    with pytest.raises(ValueError, match="tokens"):
        sparse_pays(0.5, -1)


@pytest.mark.parametrize("size", [(5, 0), (0, 5), (0, 0)], ids=str)
def test_weights_of_no_elements(size):
    x, weight, bias = torch.randn(3, size[1]), torch.randn(size), torch.randn(size[0])
    for options in ({}, {"mask": torch.zeros(0, dtype=torch.uint8)}, {"transposed": True}):
        given = leaves([x, weight.t() if "transposed" in options else weight, bias])
        y = M.linear(*given, format=Dense(), **options)
        assert_same(y.detach(), F.linear(x, weight, bias))
        y.sum().backward()
        assert [t.grad.shape for t in given] == [t.shape for t in given]
        assert_same(given[2].grad, torch.full_like(bias, 3))
