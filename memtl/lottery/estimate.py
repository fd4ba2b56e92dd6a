"""How long what is left would take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence

from ..training import Step, seeded
from .experiments import Key, Run, Setup, encoder, load
from .plan import MLM

MEASURED_STEPS = 3


def seconds(
    setup: Setup, left: Sequence[Key], sources: Iterable[str], known: Iterable[Run]
) -> float:
    """Estimated time of runs and of drawing tickets, one after another.

    A step of a task is what it was in the finished runs, evaluation included, or, of a task that
    has none, what it is now.
    """
    of: dict[str, list[float]] = {}
    for run in known:
        if run.error is None:
            of.setdefault(run.key.task, []).append(run.seconds / run.key.steps)
    step: dict[str, float] = {}
    for task in (*(key.task for key in left), *sources):
        if task not in step:
            step[task] = statistics.median(of[task]) if task in of else _measured(setup, task)
    drawing = sum(
        setup.rounds_left(source) * setup.recipe(source).steps * step[source] for source in sources
    )
    return drawing + sum(key.steps * step[key.task] for key in left)


def _measured(setup: Setup, task: str) -> float:
    """Seconds of a training step now: the median of a few."""
    data, recipe = load(task, setup.model), setup.recipe(task)
    network = encoder(setup.model)
    model = network.masked_lm() if task == MLM else network.classifier(data.num_classes, 0)
    step = Step(model.train(), recipe.settings(0))
    batch = slice(0, recipe.batch_size)
    found = []
    with seeded(0):
        for _ in range(MEASURED_STEPS):
            started = time.perf_counter()
            step(data.train.images[batch], data.train.labels[batch])
            found.append(time.perf_counter() - started)
    return statistics.median(found)
