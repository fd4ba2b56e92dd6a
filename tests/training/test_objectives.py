"""Objectives of fit: what they compute, that the seed decides, and what watches them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl.tasks import Split
from memtl.training import (
    Adversarial,
    Attack,
    CatastrophicOverfitting,
    Noisy,
    Settings,
    Trades,
    Watched,
    fit,
    loss_of,
    robust_accuracy,
)
from memtl.training.attacks import trades_loss
from tests.helpers import assert_same
from tests.training.small import images, network

ATTACK = Attack(0.05, 2)
OBJECTIVES = {
    "adversarial": Adversarial(ATTACK),
    "adversarial, l2": Adversarial(Attack(0.3, 2, norm="l2", mode="current")),
    "trades": Trades(ATTACK, beta=3.0),
    "noisy": Noisy(0.2),
}
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
SETTINGS = Settings(steps=6, batch_size=8, learning_rate=0.01, seed=3, label_smoothing=0.1)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.detach().flatten().double() for v in model.state_dict().values()])


@objectives
def test_the_seed_decides_and_the_global_random_state_is_left_alone(objective):
    split = Split(*images(20))
    before = torch.get_rng_state()
    runs = []
    for seed in (3, 3, 4):
        model = network()
        settings = Settings(**{**vars(SETTINGS), "seed": seed})
        history = fit(model, split, split, settings, objective=objective, progress=False)
        runs.append((history.losses, weights(model)))
        assert all(m.training for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_they_are_what_they_say():
    model, (x, y) = network().double().eval(), images(8, torch.float64)
    torch.manual_seed(1)
    found = Adversarial(ATTACK)(model, x, y, 0.1)
    torch.manual_seed(1)
    moved = ATTACK(model, x, y)
    assert_same(found, F.cross_entropy(model(moved), y, label_smoothing=0.1))
    torch.manual_seed(1)
    found = Trades(ATTACK, 2.0)(model, x, y, 0.1)
    torch.manual_seed(1)
    assert_same(found, trades_loss(model, x, y, 0.05, steps=2, beta=2.0, label_smoothing=0.1))
    torch.manual_seed(1)
    found = Noisy(0.2)(model, x, y, 0.1)
    torch.manual_seed(1)
    noisy = x + 0.2 * torch.randn_like(x)
    assert_same(found, F.cross_entropy(model(noisy), y, label_smoothing=0.1))


@pytest.mark.parametrize("config", [memtl.BackRazorConfig(keep=0.5), memtl.LowBitConfig()])
def test_makes_a_converted_model_robust(config):
    split, attack = Split(*images(40)), Attack(0.1, 10)
    settings = Settings(steps=60, batch_size=20, learning_rate=0.02)
    plain, robust = network(), network()
    fit(plain, split, None, settings)
    memtl.apply(robust, config)
    fit(robust, split, None, settings, objective=Adversarial(Attack(0.15, 3)))
    assert robust_accuracy(robust, split, attack) > robust_accuracy(plain, split, attack) + 0.1


def test_a_ticket_stays_a_ticket():
    model, split = network(), Split(*images(20))
    ticket = memtl.draw_ticket(model, memtl.TicketConfig(sparsity=0.5))
    ticket.apply(model)
    pruned = model[0].weight == 0
    assert 0 < pruned.sum() < pruned.numel()
    fit(model, split, None, SETTINGS, objective=Adversarial(ATTACK))
    assert torch.equal(model[0].weight == 0, pruned)
    Adversarial(ATTACK)(model, split.images, split.labels).backward()
    assert (model[0].weight.grad[pruned] == 0).all() and model[0].weight.grad.any()


def test_watching_changes_nothing_of_the_training():
    split, objective = Split(*images(20)), Adversarial(ATTACK)
    watched = Watched(objective, ATTACK, every=2, gap=0.9)
    results = []
    for chosen in (objective, watched):
        model = network()
        history = fit(model, split, None, SETTINGS, objective=chosen)
        results.append((history.losses, weights(model)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert len(watched.accuracies) == 3
    assert all(1 >= own >= ten >= 0 for own, ten in watched.accuracies)


def test_watching_ends_the_training_when_only_its_own_attack_is_withstood():
    model, (x, y) = network(), images(20)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    calls = []

    def objective(*arguments):
        calls.append(arguments)
        return loss_of(*arguments)

    alike = Watched(objective, Attack(1e-4, 1, mode="current"), every=2)
    for _ in range(4):
        assert alike(model, x, y, 0.0).isfinite()
    assert alike.accuracies == [(1.0, 1.0), (1.0, 1.0)]
    watched = Watched(objective, Attack(0.9, 1, 1e-6, random_start=False), every=2)
    watched(model, x, y, 0.0)
    with pytest.raises(CatastrophicOverfitting, match=r"step 2 100.0% .* FGSM.*% PGD-10"):
        watched(model, x, y, 0.0)
    assert watched.accuracies[0][0] == 1 and watched.accuracies[0][1] < 0.75
    assert len(calls) == 5  # nothing is learned from the batch that ended it


def test_a_model_that_fails_is_given_back():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, x):
            if not self.training:
                raise RuntimeError("in evaluation")
            return self.model(x)

    model, split = Fails(), Split(*images(20))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in evaluation"):
        fit(model, split, None, SETTINGS, objective=Adversarial(ATTACK))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_refuses():
    for make, error, said in (
        (lambda: Adversarial(0.1), TypeError, "attack must be a memtl.training.Attack, got 0.1"),
        (lambda: Trades(ATTACK, -1), ValueError, "beta must be at least 0"),
        (lambda: Trades(ATTACK, math.inf), ValueError, "beta must be at least 0 and finite"),
        (lambda: Noisy("0.1"), TypeError, "sigma must be a number"),
        (lambda: Noisy(0.0), ValueError, r"sigma must be in \(0, 1\]"),
        (lambda: Watched(None, ATTACK), TypeError, "objective must be callable"),
        (lambda: Watched(loss_of, ATTACK, every=0), ValueError, "every must be at least 1"),
        (lambda: Watched(loss_of, ATTACK, every=1.5), TypeError, "every must be an int"),
        (lambda: Watched(loss_of, ATTACK, gap="a"), TypeError, "gap must be a number"),
        (lambda: Watched(loss_of, ATTACK, gap=1), ValueError, r"gap must be in \(0, 1\)"),
    ):
        with pytest.raises(error, match=said):
            make()
