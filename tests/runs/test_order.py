"""The order of the data: what a step sees is a function of its number."""

from __future__ import annotations

import pytest
import torch

from memtl.runs.order import Batches, Order, loader, mixed
from tests.runs.small import Blobs


def seen(order: Order, first: int, last: int) -> list[list[tuple[int, int]]]:
    return list(Batches(order, first, last))


@pytest.mark.parametrize("samples", [1, 7, 30])
def test_every_sample_comes_once_an_epoch(samples):
    batches = seen(Order(samples, 4, seed=3), 0, 5 * samples)
    indices = [index for batch in batches for index, _ in batch]
    epochs = [indices[i : i + samples] for i in range(0, len(indices), samples)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    if samples > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_any_step_may_be_the_first():
    order = Order(13, 3, accumulate=2, seed=5)
    assert len(Batches(order, 4, 20)) == 32
    assert seen(order, 4, 20) == seen(order, 0, 20)[8:]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_what_one_would_see(accumulate):
    alone = Order(13, 8, accumulate, seed=1)
    both = [Order(13, 4, accumulate, rank, 2, seed=1) for rank in (0, 1)]
    for step in range(9):
        whole, *parts = (
            [item for batch in seen(order, step, step + 1) for item in batch]
            for order in (alone, *both)
        )
        assert sorted(whole) == sorted([*parts[0], *parts[1]])


def test_another_seed_another_order():
    first, second = (seen(Order(30, 30, seed=seed), 0, 1) for seed in (0, 1))
    assert first != second
    assert mixed(0, "a", 1) != mixed(0, "a", 2) != mixed(0, "b", 2)
    assert 0 <= mixed(3, "sample", 10**12) < 2**63


def test_workers_give_the_same_batches():
    order, samples = Order(10, 4, seed=2), Blobs(10, 0)
    device = torch.device("cpu")
    alone, by_two = (
        list(loader(samples, Batches(order, 3, 8), workers, device)) for workers in (0, 2)
    )
    assert len(alone) == len(by_two) == 5
    for (images, labels), (others, theirs) in zip(alone, by_two, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, theirs)
