"""exact(): gradients of converted models are stock's while it is active, and only then."""

import copy

import pytest
import torch
from torch import nn

import memtl
from memtl import assets
from memtl.nn import Layer, StandardizedConv2d, exact
from memtl.storage import Dense
from tests.helpers import assert_same

CONFIGS = {
    "back razor": memtl.BackRazorConfig(keep=0.1),
    "paper": memtl.BackRazorConfig.preset("paper", keep=0.1),
    "low bit": memtl.LowBitConfig(bits=4),
    "frozen, 4 bits": memtl.FrozenConfig(
        linear=4, convolution=4, attention=4, norm=4, activation=4
    ),
    "frozen": memtl.FrozenConfig(),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(model(x).square().sum(), wanted))


def formats(model: nn.Module) -> list:
    return [
        copy.copy(vars(m).get("memtl_formats", vars(m).get("memtl_format")))
        for m in model.modules()
        if isinstance(m, Layer)
    ]


@configs
@pytest.mark.parametrize("name", ["vit_glyphs", "cnn_glyphs"])
def test_gradients_are_stocks(name, config):
    model, x = assets.load(name).eval(), torch.rand(2, 1, 32, 32)
    expected = gradients(model, x)
    memtl.apply(model, config)
    before = formats(model)
    with exact(model):
        for found, wanted in zip(gradients(model, x), expected, strict=True):
            assert_same(found, wanted)
    assert formats(model) == before
    lossy = any(not torch.equal(a, b) for a, b in zip(gradients(model, x), expected, strict=True))
    assert lossy == (config != CONFIGS["frozen"])


@configs
def test_the_image_gradient_of_a_network_in_evaluation_is_exact_anyway(config):
    model = assets.load("cnn_glyphs").eval().requires_grad_(False)
    x = torch.rand(2, 1, 32, 32)
    expected = gradients(model, x)
    memtl.apply(model, config)
    # A frozen convolution keeps nothing, a norm in evaluation neither, ReLU6 its bits; the factors
    # of a norm are multiplied in another order.
    error = (gradients(model, x)[0] - expected[0]).norm() / expected[0].norm()
    assert error < 1e-5


def test_formats_come_back_after_an_error():
    model = assets.load("vit_glyphs")
    memtl.apply(model, memtl.BackRazorConfig())
    before = formats(model)
    with pytest.raises(RuntimeError, match="inside"), exact(model):
        assert formats(model) != before
        raise RuntimeError("inside")
    assert formats(model) == before


def test_what_is_exact_keeps_its_format_and_others_are_left_alone():
    model = nn.Sequential(StandardizedConv2d(1, 2, 3), nn.ReLU())
    with exact(model):  # not converted
        assert gradients(model, torch.rand(1, 1, 5, 5))
    memtl.apply(model, memtl.FrozenConfig(convolution=4))
    with exact(model):
        convolution, relu = formats(model)
        assert convolution == Dense() and relu["activation"] == Dense(rebuild=True)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"), exact([model]):
        pass


def test_compiled_models():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
    x = torch.randn(300, 64)
    expected = gradients(model, x)
    memtl.apply(model, memtl.BackRazorConfig(keep=0.1))
    compiled = torch.compile(model, backend="eager")
    assert not torch.equal(gradients(compiled, x)[1], expected[1])
    with exact(compiled):
        for found, wanted in zip(gradients(compiled, x), expected, strict=True):
            assert_same(found, wanted)
    assert not torch.equal(gradients(compiled, x)[1], expected[1])
