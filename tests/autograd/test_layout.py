"""Tensors that lie permuted in memory, channels last above all: they are packed as they lie, so
that no operator has to copy them, and nothing that is made of them lies otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import memtl
from memtl.memory import saved_bytes
from memtl.storage import Quantized, TopK, pack
from memtl.storage.rebuilt import Permuted, laid, pack_as_laid
from tests.helpers import assert_same, cosine

LAST = torch.channels_last

PERMUTED = {
    "channels last": lambda: torch.randn(2, 7, 5, 3).contiguous(memory_format=LAST),
    "channels last, 3d": lambda: torch.randn(2, 3, 4, 5, 2).contiguous(
        memory_format=torch.channels_last_3d
    ),
    "transposed": lambda: torch.randn(37, 11).t(),
    "heads": lambda: torch.randn(2, 9, 4, 16).transpose(1, 2),
    "last first": lambda: torch.randn(5, 6, 7).permute(2, 0, 1),
}


@pytest.mark.parametrize(
    "format", [Quantized(8), Quantized(3), Quantized(4, range=(-1, 2))], ids=str
)
@pytest.mark.parametrize("x", PERMUTED)
def test_packed_as_it_lies(x, format):
    x = PERMUTED[x]()
    packed = pack_as_laid(x, format)
    part, permuted = laid(packed)
    assert permuted is not None and packed.nbytes == format.nbytes(x.shape, x.dtype)
    assert permuted.laid(x).is_contiguous()
    flat = torch.as_strided(x, (x.numel(),), (1,))  # as memory has it
    expected = format.pack(flat)
    for a, b in zip(packed.tensors, expected, strict=True):
        assert_same(a, b)
    assert part.shape == permuted.laid(x).shape and part.format == format
    for dtype in (x.dtype, torch.bfloat16):
        made = packed.unpack(dtype)
        assert made.shape == x.shape and made.stride() == x.stride()
        assert_same(
            torch.as_strided(made, flat.shape, (1,)), format.unpack(expected, flat.shape, dtype)
        )


OTHERWISE = {
    "row-major": lambda: torch.randn(4, 6),
    "gaps": lambda: torch.randn(4, 12)[:, ::2],
    "expanded": lambda: torch.randn(4, 1).expand(4, 3),
    "empty": lambda: torch.randn(0, 3).t(),
}


@pytest.mark.parametrize("x", OTHERWISE)
def test_packed_row_major_where_it_does_not_lie_permuted(x):
    x = OTHERWISE[x]()
    packed = pack_as_laid(x, Quantized(4))
    assert packed.format == Quantized(4) and Permuted.like(x) is None
    for a, b in zip(packed.tensors, Quantized(4).pack(x.contiguous()), strict=True):
        assert_same(a, b)


def test_a_format_with_rows_keeps_its_order():
    x = torch.randn(300, 40).t()
    packed = pack_as_laid(x, TopK(0.1))
    assert packed.format == TopK(0.1)
    for a, b in zip(packed.tensors, pack(x.contiguous(), TopK(0.1)).tensors, strict=True):
        assert_same(a, b)


class Copies(TorchDispatchMode):
    """The operators of memtl that are given what they would have to copy."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        # Of a convolution's gradient it reads channels last as they are.
        knows = func is torch.ops.memtl.topk_conv_weight_grad.default
        if func.namespace == "memtl" and not all(t.is_contiguous() for t in tensors) and not knows:
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    def block(channels, groups, activation):
        return (
            nn.Conv2d(channels, 16, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(16),
            activation,
        )

    torch.manual_seed(0)
    model = nn.Sequential(
        *block(3, 1, nn.ReLU6()),
        *block(16, 16, nn.SiLU()),
        *block(16, 1, nn.Hardswish(inplace=True)),
        *block(16, 1, nn.Hardtanh(-0.5, 2.0)),
        *block(16, 4, nn.ReLU(inplace=True)),
        *block(16, 1, nn.GELU()),
        nn.Tanh(),
        nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):  # else scales before one have no gradient
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.uniform_(layer.bias, -1.0, 1.0)
    return model


CONFIGS = {
    "low-bit": memtl.LowBitConfig(bits=8),
    "fast": memtl.BackRazorConfig(keep=0.5),
    "small": memtl.BackRazorConfig.preset("small", keep=0.5),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_in_channels_last(config):
    x = torch.randn(3, 3, 17, 19)

    def step(model, x):
        copies, x = Copies(), x.clone(memory_format=torch.preserve_format).requires_grad_()
        model.zero_grad()
        loss = model(x).square().mean()
        with torch.autograd.set_multithreading_enabled(False), copies:
            loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        return loss.detach(), grads | {"x": x.grad}, copies.names

    stock, model = network(), network()
    memtl.apply(model, CONFIGS[config])
    last = copy.deepcopy(model).to(memory_format=LAST)
    there = x.contiguous(memory_format=LAST)
    with Copies() as forward:
        last(there)
    assert forward.names == []
    _, exact, _ = step(stock, x)
    loss, expected, _ = step(model, x)
    loss_last, grads, names = step(last, there)
    assert names == []
    assert grads["x"].is_contiguous(memory_format=LAST)
    torch.testing.assert_close(loss_last, loss)
    whole = [torch.cat([g.flatten() for g in of.values()]) for of in (exact, expected, grads)]
    assert cosine(whole[2], whole[0]) > cosine(whole[1], whole[0]) - 0.1 > 0.6
    if config == "low-bit":
        for name, grad in grads.items():
            assert cosine(grad, exact[name]) > 0.95, name
    assert saved_bytes(lambda: last(there)) == saved_bytes(lambda: model(x))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu"])
def test_what_a_batch_norm_made_is_decoded_in_one_pass(activation):
    """The output of norm and activation is made of codes that lie channels last."""
    from memtl import functional as M
    from memtl.autograd.share import shared

    format = Quantized(4, rebuild=True)
    x = torch.randn(2, 6, 9, 5).contiguous(memory_format=LAST).requires_grad_()
    w, b = torch.randn(2, 6).unbind()
    y = M.batch_norm(x, None, None, w, b, True, format=format)
    z = (
        getattr(M, activation)(y, format=format)
        if activation[:4] != "relu"
        else getattr(M, activation)(y)
    )
    with Copies() as copies:
        kept = shared(y), shared(z)
        assert None not in kept
        of_y, of_z = (packed.unpack() for packed in kept)
    assert copies.names == []
    for made, of in ((of_y, y), (of_z, z)):
        assert made.stride() == of.stride()
        assert cosine(made, of) > 0.97
