"""What a method costs and how well it does: measured, trained, in a table."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..report import Table, mean_std, ratio
from ..tasks import Task
from ..training import Settings, Way, costs, evaluate, fit
from .experiments import FULL, Experiment, Method, build

MIB, KIB = 2**20, 2**10
SCORES = {"accuracy": "accuracy", "mean_iou": "mean IoU"}
"""Metric of a task -> what it is called."""


@dataclasses.dataclass
class Result:
    """Figures of one method: one batch's bytes, one step's peak and time, one entry a seed."""

    name: str
    learning_rate: float
    trainable: int
    batch_size: int
    saved_bytes: int
    peak_bytes: int | None
    seconds_per_step: float
    test_score: list[float] = dataclasses.field(default_factory=list)
    val_score: list[float] = dataclasses.field(default_factory=list)
    losses: list[tuple[float, ...]] = dataclasses.field(default_factory=list)

    @property
    def saved_bytes_per_sample(self) -> float:
        return self.saved_bytes / self.batch_size


def measure(
    experiment: Experiment,
    task: Task,
    chosen: Sequence[Method],
    rounds: int,
    device: torch.device | str,
    progress: bool | None,
) -> list[Result]:
    """What each method keeps, needs at its peak, and takes: on one batch, before any training."""
    batch = torch.arange(experiment.batch_size)  # no slice, which would keep the whole split
    images, labels = (t[batch].to(device) for t in (task.train.images, task.train.labels))
    ways = [
        Way(
            functools.partial(build, experiment, method, task.num_classes, 0, device),
            images,
            labels,
        )
        for method in chosen
    ]
    return [
        Result(
            method.name,
            experiment.rates[method.kind].chosen,
            cost.trainable,
            experiment.batch_size,
            cost.saved_bytes,
            cost.peak_bytes,
            cost.seconds_per_step,
        )
        for method, cost in zip(chosen, costs(ways, rounds, progress=progress), strict=True)
    ]


def train(
    experiment: Experiment,
    task: Task,
    method: Method,
    *,
    learning_rate: float,
    seed: int,
    steps: int,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    test: bool = True,
    watch: Callable[[nn.Module, int], None] | None = None,
) -> tuple[float, float, tuple[float, ...]]:
    """One run: build, fit, and the scores on the validation and, with ``test``, the test split
    (else NaN); and the losses. ``watch`` is given the model after every step, and how many there
    have been."""
    model = build(experiment, method, task.num_classes, seed, device)
    settings = Settings(
        steps=steps, batch_size=experiment.batch_size, learning_rate=learning_rate, seed=seed
    )
    history = fit(
        model, task.train, task.val, settings, metric=task.metric, progress=progress,
        on_step=None if watch is None else functools.partial(watch, model), description=method.name,
    )  # fmt: skip
    score = evaluate(model, task.test, metric=task.metric) if test else float("nan")
    return history.val_score, score, history.losses


def table(results: Sequence[Result], score: str) -> Table:
    """The comparison, each cost beside its ratio to full fine-tuning."""
    base = next(r for r in results if r.name == FULL)
    header = (
        "method", f"test {score} %", "trained", "saved KiB/sample", "ratio", "peak MiB", "ratio",
        "s/step", "ratio",
    )  # fmt: skip
    rows = tuple(
        (
            r.name,
            mean_std([100 * a for a in r.test_score]),
            f"{r.trainable:,}",
            f"{r.saved_bytes_per_sample / KIB:,.0f}",
            ratio(r.saved_bytes, base.saved_bytes),
            "n/a" if r.peak_bytes is None else f"{r.peak_bytes / MIB:,.0f}",
            ratio(r.peak_bytes, base.peak_bytes),
            f"{r.seconds_per_step:.3f}",
            ratio(r.seconds_per_step, base.seconds_per_step),
        )
        for r in results
    )
    return Table(header, rows)


def figures(result: Result, base: Result) -> dict[str, Any]:
    """A result for JSON, with derived figures."""

    def quotient(name: str) -> float | None:
        value, other = getattr(result, name), getattr(base, name)
        return value / other if value is not None and other else None

    scores = result.test_score
    return dataclasses.asdict(result) | {
        "saved_bytes_per_sample": result.saved_bytes_per_sample,
        "test_score_mean": statistics.fmean(scores),
        "test_score_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "ratios": {
            name: quotient(name) for name in ("saved_bytes", "peak_bytes", "seconds_per_step")
        },
    }
