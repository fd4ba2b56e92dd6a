"""layer_norm and rms_norm: gradients from the stored x-hat, exactly as its formula says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memtl import functional as M
from memtl.memory import saved_bytes
from memtl.storage import Dense, Quantized, pack
from tests.helpers import FORMATS, assert_within, cosine, grad_like, leaves, run, unit

EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def x_hat_of(x, kind, eps=1e-5):
    x = x.double()
    if kind == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def gradients(x_hat, rstd, weight, g, kind):
    """grad_x and grad_weight from a stored x-hat, in float64."""
    x_hat, g, weight = x_hat.double(), g.double(), weight.double()
    scaled = g * weight
    grad_x = scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True)
    if kind == "layer_norm":
        grad_x = grad_x - scaled.mean(-1, keepdim=True)
    return grad_x * rstd, (g * x_hat).sum(0)


@EVERY_FORMAT
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients_follow_the_formula_on_the_unpacked_x_hat(format, kind):
    x, weight = leaves((3 * torch.randn(9, 300) + 1, torch.randn(300)))
    # x-hat as float32 arithmetic has it: what is stored depends on its last bits.
    wide = x.detach()
    if kind == "layer_norm":
        _, mean, rstd = torch.native_layer_norm(wide, (300,), None, None, 1e-5)
        x_hat = (wide - mean) * rstd
        out = M.layer_norm(x, (300,), weight, format=format)
    else:
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        x_hat = wide * rstd
        out = M.rms_norm(x, (300,), weight, 1e-5, format=format)
    g = grad_like(out)
    out.backward(g)
    grad_x, grad_weight = gradients(pack(x_hat, format).unpack(), rstd, weight.detach(), g, kind)
    size = 300 * unit(torch.float32) * 4  # sums of 300 terms, a few operations on each
    assert_within(x.grad, grad_x, size * grad_x.abs().max())
    assert_within(weight.grad, grad_weight, size * grad_weight.abs().max())
    assert_within(x_hat, x_hat_of(x.detach(), kind), 1e-5)


@EVERY_FORMAT
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_bytes(format, kind):
    x, weight = torch.randn(6, 8, 300), torch.randn(300)
    fn = M.layer_norm if kind == "layer_norm" else M.rms_norm
    kept = format.nbytes(x.shape, torch.float32)

    def bytes_when(*needs):
        a, w = leaves((x, weight), needs)
        return saved_bytes(lambda: fn(a, (300,), w, format=format))

    rows = 4 * 48  # rstd; the weight is referenced
    if format.exact:  # x itself, and what makes x-hat of it
        rows *= 2 if kind == "layer_norm" else 1
        kept += rows + (4 * 300 if kind == "layer_norm" else 0)
        rows = 0 if kind == "layer_norm" else 4 * 300
        assert bytes_when(False, True) == kept
        assert bytes_when(True, True) == bytes_when(True, False) == kept + rows
        return
    assert bytes_when(False, True) == kept
    assert bytes_when(True, True) == kept + rows + 4 * 300
    assert bytes_when(True, False) == kept + rows + 4 * 300
    assert bytes_when(False, False) == 0


def test_a_bias_alone_keeps_nothing():
    x, weight, bias = leaves(
        (torch.randn(6, 30), torch.randn(30), torch.randn(30)), [False, False, True]
    )
    assert saved_bytes(M.layer_norm, x, (30,), weight, bias) == 0
    out = M.layer_norm(x, (30,), weight, bias)
    out.backward(grad_like(out))
    torch.testing.assert_close(bias.grad, grad_like(out).sum(0))


@pytest.mark.parametrize("weight, bias", [(None, True), (True, None)])
def test_weight_and_bias_one_without_the_other(weight, bias):
    tensors = [torch.randn(6, 30), weight and torch.randn(30), bias and torch.randn(30)]
    out, grads, _ = run(lambda x, w, b: M.layer_norm(x, (30,), w, b, format=Dense()), tensors)
    expected, stock, _ = run(lambda x, w, b: F.layer_norm(x, (30,), w, b), tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for ours, theirs in zip(grads, stock, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_default_eps_of_rms_norm_is_torchs(dtype):
    """It matters where x is small: eps is then most of the mean square."""
    x = (torch.randn(5, 64, dtype=torch.float64) * torch.finfo(dtype).eps ** 0.5).to(dtype)
    tensors = [x, torch.randn(64, dtype=torch.float64).to(dtype)]
    out, grads, _ = run(lambda x, w: M.rms_norm(x, (64,), w, format=Dense()), tensors)
    expected, stock, _ = run(lambda x, w: F.rms_norm(x, (64,), w), tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for ours, theirs in zip(grads, stock, strict=True):
        assert_within(ours, theirs, 16 * unit(dtype) * theirs.double().abs().max())


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_few_bits_keep_the_direction_whatever_the_scale_of_x(kind):
    """x-hat is stored, not x: an offset or a large scale of x costs nothing."""
    fn, stock = getattr(M, kind), getattr(F, kind)
    for scale, offset in ((1, 0), (1e3, 0), (1e-3, 0), (1, 50 if kind == "layer_norm" else 0)):
        tensors = [torch.randn(8, 256) * scale + offset, torch.randn(256)]
        _, ours, _ = run(lambda x, w: fn(x, (256,), w, format=Quantized(4)), tensors)
        _, theirs, _ = run(lambda x, w: stock(x, (256,), w), tensors)
        for a, b in zip(ours, theirs, strict=True):
            assert cosine(a, b) > 0.97


class _Fills(TorchDispatchMode):
    """Counts the tensors of zeros that are made."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("format", [Quantized(bits=4), Dense()], ids=str)
def test_no_zeros_stand_for_the_gradients_of_statistics(format):
    x, weight, g = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    y = M.layer_norm(x, (7,), weight[0], weight[1], format=format)
    with _Fills() as fills:
        y.backward(g)
    assert fills.count == 0
    assert x.grad.abs().max() > 0


def test_an_output_without_a_gradient_gives_none():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad_out):
            return None

    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.ones(7, requires_grad=True)
    for layer_norm in (M.layer_norm, F.layer_norm):
        Cut.apply(layer_norm(x, (7,), weight)).sum().backward()
        assert x.grad is None and weight.grad is None
