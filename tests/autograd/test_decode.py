"""What is rebuilt in one pass over memory is what its recipe makes of dense parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memtl import functional as M
from memtl.autograd import activation, channel_norm, mask, norm
from memtl.autograd.share import offered
from memtl.methods import LowBitConfig
from memtl.storage import Quantized
from tests.helpers import assert_same, assert_within, grad_like

FORMATS = [Quantized(bits, rebuild=True) for bits in (8, 4, 3, 2)]
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def plain(packed, dtype):
    """As Rebuilt.unpack does where a recipe has no way of its own."""
    wide = torch.promote_types(dtype, torch.float32)
    parts = packed.format.split(packed.tensors)
    dense = (
        None
        if p is None
        else plain(p, wide)
        if hasattr(p.format, "recipe")
        else p.unpack(wide if p.dtype.is_floating_point else None)
        for p in parts
    )
    return packed.format.recipe(*dense).to(dtype)


def assert_rebuilt(y, ops_called, op):
    """y is rebuilt as the plain way rebuilds it, by ``op`` but for float64."""
    packed = offered(y)
    for dtype in (y.dtype, torch.float32, torch.float64):
        ops_called.clear()
        made, expected = packed.unpack(dtype), plain(packed, dtype)
        assert made.dtype == dtype and made.is_contiguous()
        unit = torch.finfo(dtype).eps if dtype != torch.float64 else 0
        assert_within(made, expected, unit * (expected.double().abs() + 4))
        assert (op in ops_called) == (dtype != torch.float64)


@pytest.fixture
def called():
    """The names of memtl's operators as they are called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "memtl":
                names.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Watch():
        yield names


def parameters(n, dtype):
    return (torch.randn(n, dtype=dtype, requires_grad=True) for _ in range(2))


@EVERY_FORMAT
@EVERY_DTYPE
def test_norms_over_rows(format, dtype, called):
    x = torch.randn(5, 7, 43, dtype=dtype, requires_grad=True)
    w, b = parameters(43, dtype)
    for weight, bias in ((w, b), (w, None), (None, None)):
        y = M.layer_norm(x, (43,), weight, bias, format=format)
        assert_rebuilt(y, called, "quant_unpack_affine")
    y = M.rms_norm(x, (43,), w, format=format)
    assert_rebuilt(y, called, "quant_unpack_affine")


@EVERY_FORMAT
@EVERY_DTYPE
def test_norms_over_maps_and_a_relu(format, dtype, called):
    w, b = parameters(6, dtype)
    for size in ((3, 6, 5, 7), (3, 6), (2, 6, 3), (2, 6, 9, 9)):
        x = torch.randn(size, dtype=dtype, requires_grad=True)
        y = M.batch_norm(x, None, None, w, b, True, format=format)
        assert_rebuilt(y, called, "quant_unpack_affine")
        assert_rebuilt(M.relu(y), called, "quant_unpack_affine")
        y = M.group_norm(x, 2, w, b, format=format)
        assert_rebuilt(y, called, "quant_unpack_affine")
        for other in (M.relu6(y), M.hardtanh(y, -0.5, 0.75), M.threshold(y, 0.1, -0.2)):
            assert_rebuilt(other, called, "quant_unpack_affine")
        z = M.relu(y, inplace=True)
        assert_rebuilt(z, called, "quant_unpack_affine")


def test_a_relu_behind_anything_else():
    """x is decoded by itself, and the mask applied to it."""
    x = torch.randn(70, 9, requires_grad=True)
    gelu = M.gelu(x, format=FORMATS[1])
    y = M.relu(gelu)
    packed = offered(y)
    assert_within(packed.unpack(), plain(packed, torch.float32), 1e-6)
    assert_same(packed.unpack() == 0, gelu <= 0)


@pytest.mark.parametrize("name", activation.FUSED)
@EVERY_FORMAT
def test_activations(format, name, called):
    function = getattr(M, name.removesuffix("_tanh"))
    options = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(9, 77, dtype=dtype, requires_grad=True)
        y = function(x, format=format, **options)
        packed = offered(y)
        called.clear()
        made, expected = packed.unpack(), plain(packed, dtype)
        assert ("quant_unpack_activation" in called) == (
            format.bits < 8 or name not in ("gelu", "silu")
        )
        eps = torch.finfo(dtype).eps
        assert_within(made, expected, 2 * eps * (expected.double().abs() + 2))
        g = grad_like(y).mT.contiguous().mT
        called.clear()
        y.backward(g)
        assert called == ["quant_activation_grad"]
        (source,) = packed.format.split(packed.tensors)
        slope = activation.activation(name).derivative(source.unpack(torch.float64))
        assert_within(x.grad, slope * g, (eps + 2e-6) * (g.double().abs() + 0.1))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_kept_derivative(bits, called):
    for dtype in DTYPES:
        x = torch.randn(9, 77, dtype=dtype, requires_grad=True)
        y = M.gelu(x, format=Quantized(bits))
        g = grad_like(y)
        y.backward(g)
        fused = dtype != torch.float64
        assert ("quant_apply_range" in called) == fused
        assert ("quant_unpack_range" in called) != fused
        assert ("quant_pack_derivative" in called) == fused
        packed, _ = activation.pack_activation(x.detach(), "gelu", (), Quantized(bits))
        expected = packed.unpack(torch.float32).double() * g
        assert_within(x.grad, expected, 2 * torch.finfo(dtype).eps * (g.double().abs() + 0.1))
        called.clear()


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("style", ["layer", "torch", "llama", "gemma"])
def test_norm_gradients_are_those_of_the_plain_way(format, dtype, style, monkeypatch, called):
    def gradients(weighted):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 43).to(dtype).requires_grad_()
        w, b = parameters(43, torch.float32 if style == "gemma" else dtype)
        w, b = (w, b) if weighted else (None, None)
        if style == "layer":
            y = M.layer_norm(x, (43,), w, b, format=format)
        else:
            y = M.rms_norm(x, (43,), w, 1e-6, format=format, style="torch" if w is None else style)
        called.clear()
        y.backward(grad_like(y))
        return [t.grad for t in (x, w, b) if t is not None and t.grad is not None]

    for weighted in (True, False):
        fused = gradients(weighted)
        assert called == ["quant_norm_grad"]
        with monkeypatch.context() as patch:
            patch.setattr(norm, "_fused_grads", lambda *_: None)
            expected = gradients(weighted)
        for a, b in zip(fused, expected, strict=True):
            assert a.dtype == b.dtype
            assert_within(a, b, 2 * torch.finfo(dtype).eps * b.double().abs().max() + 1e-5)


NORMS = {
    "layer": lambda x, format: M.layer_norm(x, x.shape[2:], format=format),
    "rms": lambda x, format: M.rms_norm(x, x.shape[3:], format=format),
    "group": lambda x, format: M.group_norm(x, 3, format=format),
    "batch": lambda x, format: M.batch_norm(x, None, None, training=True, format=format),
    "batch of rows": lambda x, format: M.batch_norm(
        x.flatten(1), None, None, training=True, format=format
    ),
}


def saved_by(layer, x, format):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        layer(x, format)
    return saved


@EVERY_FORMAT
@EVERY_DTYPE
@pytest.mark.parametrize("name", NORMS)
def test_what_norms_keep_is_what_the_plain_way_keeps(format, dtype, name, monkeypatch, called):
    normal = (torch.randn(4, 6, 5, 11) * 3 + 1).to(dtype)
    strided = normal.contiguous(memory_format=torch.channels_last)
    for x in (normal, strided, normal[:, :, :, :0]):
        if x.numel() == 0 and name != "layer" and name != "batch":
            continue
        x = x.detach().requires_grad_()
        called.clear()
        kept = saved_by(NORMS[name], x, format)
        assert ("quant_pack_normalized" in called) == (dtype != torch.float64 and x.numel() > 0)
        with monkeypatch.context() as patch:
            for module in (norm, channel_norm):
                patch.setattr(module, "pack_normalized", lambda *_: None)
            expected = saved_by(NORMS[name], x, format)
        for a, b in zip(kept, expected, strict=True):
            assert_same(a, b)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_batch_norm_gradients_are_those_of_the_plain_way(format, dtype, monkeypatch, called):
    def gradients(weighted):
        torch.manual_seed(1)
        x = torch.randn(3, 5, 16, 17).to(dtype).requires_grad_()
        w, b = parameters(5, dtype) if weighted else (None, None)
        y = M.batch_norm(x, None, None, w, b, training=True, format=format)
        called.clear()
        y.backward(grad_like(y))
        return [t.grad for t in (x, w, b) if t is not None]

    for weighted in (True, False):
        fused = gradients(weighted)
        assert called == ["quant_channel_norm_grad"]
        with monkeypatch.context() as patch:
            patch.setattr(channel_norm, "_fused_grads", lambda *_: None)
            expected = gradients(weighted)
        for a, b in zip(fused, expected, strict=True):
            assert a.dtype == b.dtype
            assert_within(a, b, 2 * torch.finfo(dtype).eps * b.double().abs().max() + 1e-5)


def test_a_network_gets_the_gradients_of_the_plain_way(monkeypatch):
    """With every decode switched off they are the same up to rounding."""

    def gradients():
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
            nn.LayerNorm(128), nn.Linear(128, 32), nn.GELU(), nn.Linear(32, 4),
        )  # fmt: skip
        LowBitConfig().apply(net)
        net(torch.randn(6, 3, 8, 8)).square().mean().backward()
        return [p.grad for p in net.parameters()]

    fused = gradients()
    for recipe in (norm.Affine, activation.Applied, mask.Masked):
        monkeypatch.setattr(recipe, "decode", lambda *_: None)
    monkeypatch.setattr(activation, "FUSED", {})
    monkeypatch.setattr(norm, "_fused_grads", lambda *_: None)
    for a, b in zip(fused, gradients(), strict=True):
        assert_within(a, b, 1e-4 * b.double().abs().max())
