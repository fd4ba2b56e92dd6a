import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from torch import nn

from memtl.tasks import Split
from memtl.training import evaluate, fit
from memtl.vtab import Grid, Method, Protocol, Runs
from memtl.vtab.protocol import Outcome, choose
from tests.vtab import small

PROTOCOL = Protocol(epochs=3, batch_size=8, seeds=(1, 2), search_seed=5)


@pytest.fixture
def runs(tmp_path):
    with Runs(tmp_path / "runs.jsonl") as runs:
        yield runs


def test_searches_on_one_part_and_tests_what_was_trained_on_all(runs):
    task = small.task()
    outcome = PROTOCOL.run(task, small.METHOD, runs, **small.KEYS)

    def accuracy(train: Split, tested: Split, candidate, seed: int) -> float:
        model = small.build(3, seed)
        fit(model, train, None, PROTOCOL.settings(len(train), candidate, seed))
        return evaluate(model, tested)

    scores = {c: accuracy(task.train, task.val, c, 5) for c in small.GRID}
    assert outcome.chosen == choose(scores)
    assert outcome.val_accuracy == max(scores.values())
    assert outcome.accuracies == tuple(
        accuracy(task.trainval, task.test, outcome.chosen, seed) for seed in (1, 2)
    )
    assert outcome.mean == statistics.fmean(outcome.accuracies)
    assert outcome.diverged == 0
    assert len(runs) == 4 + 2


def test_published_settings():
    settings = Protocol().settings(1000, (0.5, 1e-3), 42)
    assert (settings.steps, settings.epoch_steps, settings.batch_size) == (800, 8, 128)
    assert (settings.optimizer, settings.weight_decay, settings.seed) == ("adam", 1e-3, 42)
    rates = [settings.rate(8 * epoch) for epoch in range(100)]
    assert rates[:10] == pytest.approx([0.25 * (n + 1) / 10 for n in range(10)])
    assert rates[10] == 0.25 and rates[55] == pytest.approx(0.125)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert Protocol().seeds == (42, 44, 82, 100, 800)
    assert [*Grid()] == [(r, d) for r in (1, 0.5, 0.25, 0.1, 0.05) for d in (1e-2, 1e-3, 1e-4, 0)]


def test_ties_go_to_the_smaller_rate_then_to_the_smaller_decay():
    assert choose({(1.0, 0.1): 0.5, (0.1, 0.1): 0.5, (0.5, 0.0): 0.5}) == (0.1, 0.1)
    assert choose({(1.0, 0.1): 0.5, (1.0, 0.01): 0.5, (1.0, 1.0): 0.5}) == (1.0, 0.01)
    assert choose({(1.0, 0.1): 0.6, (0.1, 0.0): 0.5}) == (1.0, 0.1)
    assert choose({(1.0, 0.1): None, (0.1, 0.0): 0.0}) == (0.1, 0.0)
    assert choose({(1.0, 0.1): None}) is None


def test_data_are_prepared_once_a_split_and_the_model_is_finished(runs):
    task, prepared, finished = small.task(), [], []

    def prepare(model: nn.Module, split: Split) -> Split:
        assert isinstance(model, nn.Linear)
        prepared.append(len(split))
        return Split(split.images[:] * 2, split.labels)

    def finish(model: nn.Module, split: Split, settings) -> nn.Module:
        finished.append((len(split), settings.learning_rate, torch.rand(1).item()))
        assert torch.equal(split.images, small_inputs[len(split)] * 2)
        return nn.Sequential(model, Never())

    class Never(nn.Module):
        """Puts everything into a fourth class."""

        def forward(self, logits):
            return torch.cat([logits, logits.amax(1, keepdim=True) + 1], dim=1)

    small_inputs = {20: task.train.images, 30: task.trainval.images}
    method = dataclasses.replace(small.METHOD, prepare_data=prepare, finish=finish)
    before = torch.get_rng_state()
    outcome = PROTOCOL.run(task, method, runs, **small.KEYS)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(prepared) == [10, 20, 30, 30]
    assert [n for n, *_ in finished] == [20] * 4 + [30] * 2
    assert len({number for *_, number in finished[:4]}) == 1, "those of the search's seed"
    assert finished[4][2] != finished[5][2]
    assert outcome.accuracies == (0.0, 0.0)

    prepared.clear()
    method = dataclasses.replace(method, name="not the test", prepare_test=False)
    PROTOCOL.run(task, method, runs, **small.KEYS)
    assert sorted(prepared) == [10, 20, 30]


def test_a_candidate_that_diverges_is_not_chosen(runs):
    grid = Grid((1e30, 0.1), (0.0,))
    method = Method(
        "product", lambda n, s: nn.Sequential(small.build(4, s), Cube(), small.build(n, s)), grid
    )
    outcome = PROTOCOL.run(small.task(), method, runs, **small.KEYS)
    assert outcome.chosen == (0.1, 0.0) and len(outcome.tested) == 2
    assert outcome.diverged == 1
    alone = dataclasses.replace(method, name="alone", grid=Grid((1e30,), (0.0,)))
    outcome = PROTOCOL.run(small.task(), alone, runs, **small.KEYS)
    assert outcome.chosen is outcome.val_accuracy is outcome.mean is None
    assert (outcome.accuracies, outcome.tested) == ((None, None), ())
    assert PROTOCOL.run(small.task(), alone, runs, **small.KEYS) == outcome


class Cube(nn.Module):
    def forward(self, x):
        return x**3


def test_an_outcome_of_which_a_seed_diverged_has_no_mean():
    outcome = Outcome("m", "d", "g", (1.0, 0.0), 0.5, (0.5, None), 1)
    assert outcome.tested == () and outcome.mean is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seeds": ()}, "seeds must be one or more, each once"),
        ({"seeds": (1, 2, 1)}, "seeds must be one or more, each once, got [1, 2, 1]"),
    ],
)
def test_a_protocol_is_checked(options, said):
    with pytest.raises(ValueError) as error:
        Protocol(**options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("rates", "decays", "said"),
    [
        ((), (0.0,), "a grid needs a learning rate"),
        ((1.0,), (), "a grid needs a weight decay"),
        ((0.0,), (0.0,), "a learning rate must be finite and positive, got 0"),
        ((1.0, math.inf), (0.0,), "a learning rate must be finite and positive, got inf"),
        ((1.0,), (-1.0,), "a weight decay must be finite and at least 0, got -1"),
        ((1.0,), (0.1, 0.1), "the weight decay 0.1 is in the grid twice"),
    ],
)
def test_a_grid_is_checked(rates, decays, said):
    with pytest.raises(ValueError, match=said):
        Grid(rates, decays)
