"""The gradient check: it passes honest networks, and finds out those that hide."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from memtl import assets
from memtl.models import Normalized
from memtl.tasks import Split, load_digits
from memtl.tasks.digits import MEAN, STD
from memtl.training import (
    Adversarial,
    Attack,
    GradientCheck,
    Settings,
    check_gradients,
    fit,
    loss_of,
    robust_accuracy,
)
from tests.training.small import CLASSES, images, network

ATTACK = Attack(0.1, 4)
SIGNS = {
    "random": "the model is random",
    "zero": "gradient is exactly zero",
    "one step": "one step is stronger",
    "points": "random points are stronger",
    "search": "a search without gradients is stronger",
    "falls": "the loss falls",
    "steps": "more steps do not raise the loss",
    "eps": "accuracy rises",
    "unbounded": "withstand an attack without a bound",
}


def signs(check: GradientCheck) -> set[str]:
    found = {name for name, said in SIGNS.items() for failure in check.failures if said in failure}
    assert len(found) <= len(check.failures) and check.ok == (not check.failures)
    return found


def trained(objective=loss_of) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small network, and the images it knows."""
    model, (x, y) = network(), images(40)
    settings = Settings(steps=60, batch_size=20, learning_rate=0.02)
    fit(model, Split(x, y), None, settings, objective=objective)
    return model.eval(), x, y


class Around(nn.Module):
    """A network, and something that hides its gradients."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class Rounded(Around):
    def forward(self, x):
        return self.model((8 * x).round() / 8)


class Saturated(Around):
    def forward(self, x):
        return 1e4 * self.model(x)


class Random(Around):
    def forward(self, x):
        return self.model(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "objective", [loss_of, Adversarial(Attack(0.15, 3))], ids=["plain", "robust"]
)
def test_passes_honest_networks(objective, norm):
    attack = ATTACK if norm == "linf" else Attack(0.6, 4, norm="l2")
    check = check_gradients(*trained(objective), attack, queries=50)
    assert check.ok, str(check)
    assert check.accuracy > 0.9 and check.chance == 1 / CLASSES
    assert check.iterative <= check.one_step < check.accuracy
    assert check.iterative < check.random_search
    assert [steps for steps, _ in check.losses] == [1, 2, 4]
    largest = 1 if norm == "linf" else math.sqrt(70)
    assert [eps for eps, _ in check.by_eps] == [attack.eps / 2, attack.eps, 2 * attack.eps, largest]


def test_passes_the_shipped_network_plain_and_made_robust():
    task = load_digits(16, normalised=False)
    x, y = task.test.images[:20], task.test.labels[:20]
    model = Normalized(assets.load("cnn_glyphs", 10), MEAN, STD)
    for objective in (loss_of, Adversarial(Attack(0.1, 1))):
        settings = Settings(steps=20, batch_size=24, learning_rate=4e-3)
        fit(model, task.train, None, settings, objective=objective, progress=False)
        check = check_gradients(model, x, y, Attack(0.1, 5), queries=15, tolerance=0.05)
        assert check.ok, str(check)
        assert check.accuracy > 0.5 and check.iterative < check.random


def test_finds_out_rounded_images():
    model, x, y = trained()
    check = check_gradients(Rounded(model), x, y, ATTACK, queries=100)
    assert {"zero", "search", "steps"} <= signs(check)
    assert check.zero_gradients == 1
    assert check.random_search < check.iterative


def test_finds_out_saturated_logits():
    model, x, y = trained()
    check = check_gradients(Saturated(model), x, y, ATTACK, queries=100)
    assert {"zero", "search"} <= signs(check)
    # It is the same classifier, which the gradient of the logits themselves shows.
    assert check.random_search == check_gradients(model, x, y, ATTACK, queries=100).random_search


def test_finds_out_random_models():
    model, x, y = trained()
    check = check_gradients(Random(model), x, y, ATTACK, queries=20)
    assert "random" in signs(check) and check.randomness > 0.01


def test_a_graph_that_is_cut_is_an_error():
    class Cut(Around):
        def forward(self, x):
            return self.model((255 * x).to(torch.uint8) / 255)

    model, x, y = trained()
    with pytest.raises(ValueError, match="no gradient reaches the images"):
        check_gradients(Cut(model), x, y, ATTACK)


GOOD = GradientCheck(
    attack=ATTACK,
    accuracy=0.9,
    chance=0.1,
    randomness=0.0,
    zero_gradients=0.0,
    one_step=0.5,
    iterative=0.3,
    losses=((1, 1.0), (2, 2.0), (4, 3.0)),
    by_eps=((0.05, 0.6), (0.1, 0.3), (0.2, 0.1), (1.0, 0.0)),
    random=0.8,
    random_search=0.6,
    queries=100,
    tolerance=0.02,
)


@pytest.mark.parametrize(
    ("sign", "measured"),
    [
        ("random", {"randomness": 0.001}),
        ("zero", {"zero_gradients": 0.03}),
        ("one step", {"one_step": 0.27}),
        ("points", {"random": 0.27}),
        ("search", {"random_search": 0.27}),
        ("falls", {"losses": ((1, 1.0), (2, 2.0), (4, 1.9))}),
        ("steps", {"losses": ((1, 1.0), (2, 1.0), (4, 1.0))}),
        ("eps", {"by_eps": ((0.05, 0.6), (0.1, 0.3), (0.2, 0.33), (1.0, 0.0))}),
        ("unbounded", {"by_eps": ((0.05, 0.6), (0.1, 0.3), (1.0, 0.13))}),
    ],
)
def test_every_sign_is_told_by_itself(sign, measured):
    assert GOOD.ok and GOOD.failures == () and "WRONG" not in str(GOOD)
    check = dataclasses.replace(GOOD, **measured)
    assert signs(check) == {sign} and not check.ok
    text = str(check).splitlines()
    assert text[-1] == f"- {check.failures[0]}" and sum("WRONG" in line for line in text) == 1


def test_a_little_is_tolerated():
    measured = {
        "zero_gradients": 0.02,
        "one_step": 0.29,
        "random": 0.29,
        "random_search": 0.29,
        "losses": ((1, 1.0), (2, 2.0), (4, 1.97)),
        "by_eps": ((0.05, 0.3), (0.1, 0.31), (0.2, 0.3), (1.0, 0.11)),
    }
    assert dataclasses.replace(GOOD, **measured).ok


@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_an_attack_of_two_long_steps(eps):
    model, x, y = trained()
    check = check_gradients(model, x, y, Attack(eps, 2), queries=2)
    assert check.by_eps[-1][0] == 1 and check.by_eps[-1][1] <= check.iterative <= check.accuracy


def test_leaves_the_model_and_the_random_state_alone():
    model, x, y = trained()
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.get_rng_state()
    first = check_gradients(model, x, y, ATTACK, queries=5, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.inference_mode():
        assert check_gradients(model, x, y, ATTACK, queries=5, seed=2) == first
    assert first.iterative == robust_accuracy(model, Split(x, y), ATTACK, seed=2)


def test_refuses():
    model, (x, y) = network(), images()
    for arguments, options, error, said in (
        ((x, y, 0.1), {}, TypeError, "attack must be a memtl.training.Attack"),
        ((x, y, Attack(0.1, 1)), {}, ValueError, "several steps, got FGSM"),
        ((x * 2, y, ATTACK), {}, ValueError, "normalised already"),
        ((x[:, 0], y, ATTACK), {}, ValueError, r"\[n, C, H, W\], and some, got \[6, 5, 7\]"),
        ((x[:0], y[:0], ATTACK), {}, ValueError, "and some, got"),
        ((x, y.tolist(), ATTACK), {}, TypeError, "labels must be an int64 tensor, got list"),
        ((x, y, ATTACK), {"tolerance": "a"}, TypeError, "tolerance must be a number, got 'a'"),
        ((x, y + 9, ATTACK), {}, ValueError, "labels must be in"),
        ((x, y, ATTACK), {"queries": 0}, ValueError, "queries must be at least 1"),
        ((x, y, ATTACK), {"queries": 2.5}, TypeError, "queries must be an int"),
        ((x, y, ATTACK), {"tolerance": 1}, ValueError, r"tolerance must be in \[0, 1\)"),
    ):
        with pytest.raises(error, match=said):
            check_gradients(model, *arguments, **options)
