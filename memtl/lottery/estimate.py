"""How long what is left would take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence

import torch

from ..training import Step, evaluating, seeded
from .experiments import Key, Run, Setup, encoder, load
from .plan import MLM

STEPS, SCORED = 3, 128


def seconds(
    setup: Setup, left: Sequence[Key], sources: Iterable[str], known: Iterable[Run]
) -> float:
    """Estimated time of runs and of the rounds of tickets, one after another.

    A run takes what finished ones of its task and encoder, with as many steps, took, and a round as
    long. Of a task that has none a few steps are measured, and the evaluation of a few samples.
    """
    finished: dict[tuple[str, str, int, int], list[float]] = {}
    for run in known:
        if run.error is None:
            key = (run.key.model, run.key.task, run.key.steps, run.key.batch_size)
            finished.setdefault(key, []).append(run.seconds)
    of = {}
    for task in dict.fromkeys([*(key.task for key in left), *sources]):
        recipe = setup.recipe(task)
        model = encoder(setup.model).fingerprint
        found = finished.get((model, task, recipe.steps, recipe.batch_size))
        of[task] = statistics.median(found) if found else _measured(setup, task)
    rounds = sum(setup.rounds_left(source) * of[source] for source in sources)
    return rounds + sum(of[key.task] for key in left)


def _measured(setup: Setup, task: str) -> float:
    """Seconds of a run, from a few steps and the answers to a few samples."""
    data, recipe = load(task, setup.model), setup.recipe(task)
    model = encoder(setup.model).build(data.head, data.num_classes, 0).to(setup.device)
    step = Step(model.train(), recipe.settings(0))
    batch = slice(0, recipe.batch_size)
    found = []
    with seeded(0):
        for _ in range(STEPS):
            started = time.perf_counter()
            step(*(part[batch].to(setup.device) for part in (data.train.images, data.train.labels)))
            found.append(time.perf_counter() - started)
    training = recipe.steps * statistics.median(found)
    if task == MLM:  # whose rounds are not scored
        return training
    batches = data.test.images.split(SCORED)
    with evaluating(model), torch.no_grad():
        started = time.perf_counter()
        model(next(iter(batches)).to(setup.device))
    return training + (time.perf_counter() - started) * len(data.test) / SCORED
