"""Accuracies under attack: what is counted, with which gradients; AutoAttack where it is."""

import sys

import pytest
import torch
from torch import nn

import memtl
from memtl import assets
from memtl.models import Normalized
from memtl.tasks import Split
from memtl.training import Attack, Settings, autoattack, evaluate, fit, robust_accuracy
from tests.helpers import assert_same
from tests.training.small import CLASSES, images, network


def trained() -> tuple[nn.Module, Split]:
    """A network that knows its images."""
    model, split = network(), Split(*images(40))
    fit(model, split, None, Settings(steps=60, batch_size=20, learning_rate=0.02))
    return model, split


def test_is_the_share_that_withstands_every_step():
    model, split = trained()
    attack = Attack(0.1, 5)
    found = robust_accuracy(model, split, attack, batch_size=40, seed=3)

    torch.manual_seed(3)
    model.eval()
    right = model(split.images).argmax(1) == split.labels
    x, y = split.images[right], split.labels[right]
    start = x + torch.empty_like(x).uniform_(-0.1, 0.1)
    now = (x + (start - x).clamp(-0.1, 0.1)).clamp(0, 1)
    withstands = torch.ones(len(x), dtype=torch.bool)
    for _ in range(6):
        now = now.detach().requires_grad_()
        logits = model(now)
        withstands &= logits.argmax(1) == y
        nn.functional.cross_entropy(logits, y, reduction="sum").backward()
        now = now.detach() + attack.step * now.grad.sign()
        now = (x + (now - x).clamp(-0.1, 0.1)).clamp(0, 1)
    expected = withstands.sum().item() / len(split)
    assert 0 < expected < right.double().mean().item()
    assert found == pytest.approx(expected, abs=1 / 40 + 1e-9)  # a sum of other order may tip one


def test_more_steps_and_larger_balls_are_stronger():
    model, split = trained()
    few, many, wide = (
        robust_accuracy(model, split, attack)
        for attack in (Attack(0.1, 3, 0.025), Attack(0.1, 20, 0.025), Attack(0.5, 20))
    )
    assert evaluate(model, split) >= few >= many > wide
    assert wide == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_leaves_everything_as_it_was(norm):
    model, split = trained()
    model.train()
    before = torch.get_rng_state()
    first = robust_accuracy(model, split, Attack(0.1, 3, norm=norm), batch_size=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        assert robust_accuracy(model, split, Attack(0.1, 3, norm=norm), batch_size=7) == first


class Spy(nn.Module):
    """Notes the gradient that every image gets."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.gradients: list[torch.Tensor] = []

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(self.gradients.append)
        return self.model(x)


@pytest.mark.parametrize("config", [memtl.BackRazorConfig(keep=0.1), memtl.LowBitConfig(bits=4)])
def test_gradients_of_a_converted_transformer_are_exact(config):
    spy = Spy(Normalized(assets.load("vit_glyphs"), 0.3, 0.4))
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        split = Split(x, spy.eval()(x).argmax(1))
    attack = Attack(0.02, 2)
    robust_accuracy(spy, split, attack)
    stock, spy.gradients = spy.gradients, []
    memtl.apply(spy.model.model, config)
    robust_accuracy(spy, split, attack)
    assert len(spy.gradients) == len(stock) > 0
    for found, expected in zip(spy.gradients, stock, strict=True):
        assert_same(found, expected)
    spy.gradients = []
    with memtl.training.seeded(0):
        attack(spy, *(split.images, split.labels))
    assert not torch.equal(spy.gradients[0], stock[0])  # in training, as what is stored gives it


def test_a_model_without_parameters():
    x = torch.rand(6, 3, 4, 4)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # the class of the largest mean
    y = model(x).argmax(1)
    assert robust_accuracy(model, Split(x, y), Attack(1e-6, 2)) == 1
    assert robust_accuracy(model, Split(x, y), Attack(0.9, 2)) == 0


def test_refuses():
    model, (x, y) = network(), images()
    attack = Attack(0.1, 2)
    with pytest.raises(TypeError, match="attack must be a memtl.training.Attack, got 0.1"):
        robust_accuracy(model, Split(x, y), 0.1)
    with pytest.raises(TypeError, match="batch_size must be an int, got '8'"):
        robust_accuracy(model, Split(x, y), attack, batch_size="8")
    for split, error, said in (
        (Split(x[:0], y[:0]), ValueError, "empty split"),
        (Split(x * 3, y), ValueError, "normalised already"),
        (Split(x, y + CLASSES), ValueError, "labels must be in 0 .. 4"),
        (Split(x, y[:, None]), ValueError, r"one class an image, \[n\], got \[6, 1\]"),
        (Split(x, y.float()), TypeError, "labels must be int64"),
        (Split((255 * x).to(torch.uint8), y), TypeError, "got torch.uint8"),
    ):
        with pytest.raises(error, match=said):
            robust_accuracy(model, split, attack)
        with pytest.raises(error, match=said):
            autoattack(model, split, 0.1)
    with pytest.raises(ValueError, match='needs mode "eval"'):
        robust_accuracy(model, Split(x, model.eval()(x).argmax(1)), Attack(0.1, mode="current"))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        robust_accuracy(model, Split(x, y), attack, batch_size=0)
    with pytest.raises(ValueError, match="version must be one of"):
        autoattack(model, Split(x, y), 0.1, version="custom")
    with pytest.raises(ValueError, match="norm must be one of"):
        autoattack(model, Split(x, y), 0.1, norm="Linf")
    model[-1] = nn.Linear(6 * 5 * 7, 3)
    with pytest.raises(ValueError, match="at least 4 classes, got logits of 3"):
        autoattack(model, Split(x, y % 3), 0.1)


def test_autoattack_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        autoattack(network(), Split(*images()), 0.1)


def test_autoattack():
    pytest.importorskip("pyautoattack")
    model, split = trained()
    model.train()
    split = Split(split.images[:4], split.labels[:4])
    before = torch.get_rng_state()
    found = autoattack(model, split, 0.1)
    assert torch.equal(torch.get_rng_state(), before)
    assert found <= robust_accuracy(model, split, Attack(0.1, 20)) <= evaluate(model, split)
    assert autoattack(model, split, 0.6) == autoattack(model, split, 8, "l2") == 0
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
