"""The analytic memory model: by hand on small networks, and the figures of the papers."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

import memtl
from memtl import analytic, models


def activations(model, *inputs):
    return analytic.profile(model, *inputs).activation_bytes


def bytes_of(*elements):
    return 4 * sum(elements)


X = torch.zeros(1, 4, 6, 6)  # 144 elements


class Residual(nn.Module):
    """What its layers make of x, and x."""

    def __init__(self, *layers, has_skip=True):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.has_skip = has_skip

    def forward(self, x):
        y = self.layers(x)
        return x + y if self.has_skip else y


def test_what_a_layer_needs_while_it_runs():
    assert activations(nn.Conv2d(4, 8, 1).requires_grad_(False), X) == bytes_of(144, 288)
    assert activations(nn.Conv2d(4, 8, 1, groups=2).requires_grad_(False), X) == bytes_of(144, 144)
    assert activations(nn.Conv2d(4, 4, 3, stride=2, padding=1), X) == bytes_of(144, 36)
    assert activations(nn.ConvTranspose2d(4, 2, 2, stride=2), X) == bytes_of(144, 288)
    assert activations(nn.Linear(6, 2), X) == bytes_of(144, 48)
    for layer in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(6), nn.ReLU(), nn.Sigmoid()):
        assert activations(layer, X) == bytes_of(144)
    for layer in (nn.Identity(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten()):
        assert activations(layer, X) == 0


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        (nn.Conv2d(4, 4, 1), 144),
        (nn.Linear(6, 6), 144),
        (nn.BatchNorm2d(4), 144),
        (nn.BatchNorm2d(4, affine=False), 0),
        (nn.GroupNorm(2, 4), 144),
        (nn.LayerNorm(6), 144),
        (nn.ReLU(inplace=True), 144 / 32),
        (nn.ReLU6(), 144 / 32),
        (nn.LeakyReLU(), 144 / 32),
        (nn.Sigmoid(), 144),
        (nn.Tanh(), 144),
        (nn.Hardswish(), 144),
        (nn.Hardsigmoid(), 144),
        (nn.GELU(), 144),
        (nn.SiLU(), 144),
        (nn.MaxPool2d(1), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_a_layer_keeps(layer, kept):
    first, last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 100, 1)
    first.weight.requires_grad_(False)  # its bias trains, and its input is not kept
    model = nn.Sequential(first, layer, last, nn.ReLU().requires_grad_(False))
    assert activations(model[:3], X) == bytes_of(kept, 144, 3600)  # the last keeps x afterwards
    layer.requires_grad_(False)
    parameters = isinstance(layer, (nn.Conv2d, nn.Linear, *analytic.NORMS))
    assert activations(model[:3], X) == bytes_of(0 if parameters else kept, 144, 3600)


def test_activations_keep_nothing_before_the_classifier_alone():
    head = nn.Linear(144, 3)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), head)
    model[0].requires_grad_(False)
    assert activations(model, X) == bytes_of(144, 144)
    wide = nn.Sequential(*model[:3], nn.Linear(144, 1000))
    assert activations(wide, X) == bytes_of(144, 1000)
    model[0].bias.requires_grad_(True)
    assert activations(wide, X) == bytes_of(144, 1000, 144 / 32)
    head.requires_grad_(False)
    assert activations(model.requires_grad_(False), X) == bytes_of(144, 144)


def test_a_residual_block_holds_its_input():
    def frozen(has_skip):
        layers = nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
        return Residual(*layers, has_skip=has_skip).requires_grad_(False)

    assert activations(frozen(False), X) == bytes_of(288, 144)
    assert activations(frozen(True), X) == bytes_of(288, 144, 144)
    after = nn.Conv2d(4, 12, 1).requires_grad_(False)  # its input is let go before
    assert activations(nn.Sequential(frozen(True), after), X) == bytes_of(144, 432)
    nested = Residual(frozen(True)).requires_grad_(False)
    assert activations(nested, X) == bytes_of(288, 144, 144, 144)


class BasicBlock(nn.Module):
    """Known by its name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.conv(x)


class Derived(BasicBlock):
    pass


def test_how_a_residual_block_is_known():
    for block in (BasicBlock(), Derived()):
        block.requires_grad_(False)
        assert activations(block, X) == bytes_of(144, 144, 144)
        block.shortcut = None  # what it says of itself comes before its name
        assert activations(block, X) == bytes_of(144, 144)
        block.shortcut = nn.Identity()
        assert activations(block, X) == bytes_of(144, 144, 144)
        block.use_res_connect = False
        assert activations(block, X) == bytes_of(144, 144)


def test_the_blocks_of_timm_and_torchvision():
    pytest.importorskip("timm")
    for name, kinds in {
        "resnet18": {"BasicBlock": 8},
        "resnet50": {"Bottleneck": 16},
        "mobilenetv2_100": {"InvertedResidual": 10},
        "convnext_atto": {"ConvNeXtBlock": 12},
        "vit_tiny_patch16_224": {"Block": 12},
        "regnetx_002": {"Bottleneck": 13},
    }.items():
        model = models.timm_model(name)
        found = [type(m).__name__ for m in model.modules() if analytic._is_residual(m)]
        assert {kind: found.count(kind) for kind in found} == kinds, name
    torchvision = pytest.importorskip("torchvision")
    for build, count in ((torchvision.models.resnet18, 8), (torchvision.models.mobilenet_v2, 10)):
        assert sum(map(analytic._is_residual, build().modules())) == count


def test_a_norm_with_its_activation_counts_as_both():
    timm_layers = pytest.importorskip("timm.layers")
    last = nn.Conv2d(4, 100, 1)
    fused = nn.Sequential(timm_layers.BatchNormAct2d(4, act_layer=nn.ReLU6), last)
    apart = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6(), last)
    assert activations(fused, X) == activations(apart, X) == bytes_of(144, 144 / 32, 144, 3600)
    fused[0].weight.requires_grad_(False)
    assert activations(fused, X) == bytes_of(144 / 32, 144, 3600)


def test_activations_of_timm():
    activation = pytest.importorskip("timm.layers.activations")
    for name in ("HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Swish", "GELUTanh"):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), getattr(activation, name)())
        assert activations(nn.Sequential(model, nn.Conv2d(4, 100, 1)), X) == bytes_of(
            144, 144, 144, 3600
        )


def test_a_module_that_runs_twice_counts_twice():
    relu = nn.ReLU()
    first, last = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 100, 1)
    model = nn.Sequential(first, relu, nn.Conv2d(8, 4, 1), relu, last)
    kept = 144 + 288 / 32 + 288 + 144 / 32
    assert activations(model, X) == bytes_of(kept, 144, 3600)


def test_what_a_hook_of_a_block_runs_comes_after_it():
    """A side module in a hook: its layers count where they run, and the block has let go of x."""
    block = Residual(nn.Conv2d(4, 4, 1)).requires_grad_(False)
    block.side = nn.Conv2d(4, 50, 1)
    block.register_forward_hook(lambda block, args, y: y + block.side(args[0]).mean())
    assert activations(block, X) == bytes_of(144, 1800)
    inside = Residual(nn.Conv2d(4, 4, 1)).requires_grad_(False)
    inside.side = nn.Conv2d(4, 50, 1)
    inside.layers.register_forward_hook(lambda _, args, y: y + inside.side(args[0]).mean())
    assert activations(inside, X) == bytes_of(144, 1800, 144)
    after = nn.Sequential(block, nn.Conv2d(4, 100, 1).requires_grad_(False))
    assert activations(after, X) == bytes_of(144, 144, 3600)  # kept by the side module


def test_parameters_and_the_total():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    model[0].requires_grad_(False)
    found = analytic.profile(model, torch.zeros(3, 6), batch_size=10)
    assert found.parameter_bytes == 42 + 4 * 7
    assert found.activation_bytes == bytes_of(6, 6)  # of one of three samples
    assert found.total_bytes == 70 + 10 * bytes_of(12)
    wide = analytic.profile(model, torch.zeros(1, 6), trainable_bits=16, frozen_bits=4)
    assert wide.parameter_bytes == 21 + 2 * 7
    assert "analytic (TinyTL's definition)" in str(found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.batch_size = 1
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    assert analytic.profile(tied, torch.zeros(1, 6)).parameter_bytes == 4 * (36 + 6 + 6)


def network(method):
    """ProxylessNAS-Mobile with 102 classes, as the papers train it."""
    pytest.importorskip("timm")
    model = models.proxylessnas_mobile(num_classes=102)
    if method != "full":
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    if method == "norm+last":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("method", "total", "a_sample"),
    [("last", 29.0, 3.21), ("norm+last", 183.0, 22.4), ("full", 367.0, 44.4)],
)
def test_figures_of_the_papers(method, total, a_sample):
    found = analytic.profile(network(method), torch.zeros(1, 3, 224, 224), batch_size=8)
    assert found.total_bytes / 1e6 == pytest.approx(total, abs=0.06)
    assert found.activation_bytes / 1e6 == pytest.approx(a_sample, abs=0.06)


def test_converted_models_count_the_same():
    model = network("norm+last")
    x = torch.zeros(1, 3, 64, 64)
    before = analytic.profile(model, x)
    memtl.apply(model, memtl.FrozenConfig())
    assert analytic.profile(model, x) == before


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    block = Residual(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    model = nn.Sequential(block, Fails() if fails else nn.Identity()).train()
    block.layers[1].eval()
    calls = []
    block.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    names = [set(vars(module)) for module in model.modules()]
    x, random = torch.randn(2, 4, 6, 6), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose") if fails else contextlib.nullcontext():
        analytic.profile(model, x)
    assert torch.equal(random, torch.get_rng_state())
    assert calls == [False]
    assert modes == [module.training for module in model.modules()]
    assert names == [set(vars(module)) for module in model.modules()]
    for module in model.modules():
        own = 1 if module is block else 0
        assert len(module._forward_hooks) == own
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        ((print, X), {}, TypeError, "model must be a torch.nn.Module"),
        ((nn.ReLU(),), {}, TypeError, "a tensor of samples, got nothing"),
        ((nn.ReLU(), [X]), {}, TypeError, "a tensor of samples, got list"),
        ((nn.ReLU(), torch.zeros(())), {}, ValueError, r"samples \[B, ...\], got \[\]"),
        ((nn.ReLU(), X[:0]), {}, ValueError, r"got \[0, 4, 6, 6\]"),
        ((nn.ReLU(), X), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ((nn.ReLU(), X), {"frozen_bits": 0.5}, TypeError, "frozen_bits must be an int, got float"),
        ((nn.ReLU(), X), {"trainable_bits": True}, TypeError, "trainable_bits must be an int"),
    ],
)
def test_errors(arguments, options, error, said):
    with pytest.raises(error, match=said):
        analytic.profile(*arguments, **options)


def test_weights_in_eight_bits_count_as_frozen_ones_do():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    plain = analytic.profile(model, torch.randn(1, 3, 4, 4))
    memtl.nn.compress_weights(model)
    assert analytic.profile(model, torch.randn(1, 3, 4, 4)) == plain
