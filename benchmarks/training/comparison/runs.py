"""Tuning, training and measuring; what is finished stays on the disk, and is not done again."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import memtl
from memtl.demo.results import measure, train
from memtl.report.journal import Journal
from memtl.tasks import Split, Task
from memtl.training import evaluate

from .entries import BACKBONES, RATES, Backbone, Entry, entries

TUNING_SEED = 100
"""None of those of the comparison."""


@dataclasses.dataclass(frozen=True)
class RunKey:
    """What tells a run from others. It does not cover what an entry does: after a change of that,
    choose another folder."""

    backbone: str
    entry: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    memtl: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished one: accuracy on the validation split; on the test split, and what was seen on
    the way (:class:`Backbone.every`), unless it chose a learning rate."""

    key: RunKey
    val: float
    test: float | None
    curve: list[float]


@dataclasses.dataclass(frozen=True)
class FootprintKey:
    backbone: str
    entry: str
    batch_size: int
    memtl: str


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Of one batch, in a process of its own: bytes saved for backward, and the peak of forward and
    backward beyond the model, its gradients and the optimizer's state."""

    key: FootprintKey
    saved_bytes: int
    peak_bytes: int | None
    trainable: int


def compare(
    backbones: tuple[Backbone, ...],
    seeds: int,
    rounds: int,
    folder: Path,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """All of it, one record a backbone; called again with the same folder, it goes on where it
    was. Step times are measured anew in any case: ``rounds`` steps each, in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    with (
        Journal(folder / "runs.jsonl", Run) as runs,
        Journal(folder / "footprints.jsonl", Footprint) as footprints,
    ):
        for backbone in backbones:
            task = backbone.load_task()
            study = _Study(backbone, task, runs, footprints, say)
            records.append(study.record(seeds, rounds))
    return records


@dataclasses.dataclass
class _Study:
    """Everything of one backbone."""

    backbone: Backbone
    task: Task
    runs: Journal[Run]
    footprints: Journal[Footprint]
    say: Callable[[str], None]

    def record(self, seeds: int, rounds: int) -> dict[str, Any]:
        chosen = entries(self.backbone)
        footprints = [self.footprint(entry) for entry in chosen]
        rates = {e.name: self.tuned(e) for e in chosen if e.same_as is None}
        rates |= {e.name: rates[e.same_as] for e in chosen if e.same_as is not None}
        trained = {
            entry.name: [self.run(entry, rates[entry.name][0], seed) for seed in range(seeds)]
            for entry in chosen
            if entry.trained_as(self.backbone) == entry.name
        }
        methods = [entry.method for entry in chosen]
        load = os.getloadavg()[0]
        measured = measure(self.backbone.experiment, self.task, methods, rounds, "cpu", None)
        rows = []
        for entry, footprint, timed in zip(chosen, footprints, measured, strict=True):
            rate, scores = rates[entry.name]
            done = trained[entry.trained_as(self.backbone)]
            steps = steps_to(self.backbone, [run.curve for run in done])
            rows.append(
                {
                    "entry": entry.name,
                    "trained_as": entry.trained_as(self.backbone),
                    "learning_rate": rate,
                    "tuning": scores,
                    "val": [run.val for run in done],
                    "test": [run.test for run in done],
                    "curves": [run.curve for run in done],
                    "trainable": footprint.trainable,
                    "saved_bytes_per_sample": footprint.saved_bytes / self.backbone.batch_size,
                    "peak_bytes": footprint.peak_bytes,
                    "seconds_per_step": timed.seconds_per_step,
                    "steps_to_target": steps,
                    "seconds_to_target": None if steps is None else steps * timed.seconds_per_step,
                }
            )
        sizes = {name: len(getattr(self.task, name)) for name in ("train", "val", "test")}
        facts = {"sizes": sizes, "rounds": rounds, "load_average": load}
        return dataclasses.asdict(self.backbone) | facts | {"rows": rows}

    def footprint(self, entry: Entry) -> Footprint:
        """In a fresh process: what others have freed would hide in its peak."""
        size = self.backbone.batch_size
        key = FootprintKey(self.backbone.name, entry.name, size, memtl.__version__)
        found = self.footprints.find(key)
        if found is None:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context) as process:
                figures = process.submit(_footprint, self.backbone, entry.name).result()
            found = Footprint(key, *figures)
            self.footprints.add(found)
            self.say(f"{self.backbone.name:5} {entry.name:27} memory")
        return found

    def tuned(self, entry: Entry) -> tuple[float, dict[str, float]]:
        """The learning rate with the best accuracy on the validation split, of equal ones the
        smallest; and all of them."""
        scores = {
            rate: self.run(entry, rate, TUNING_SEED, tuning=True).val for rate in RATES[entry.kind]
        }
        best = max(scores, key=lambda rate: scores[rate])
        return best, {f"{rate:g}": score for rate, score in scores.items()}

    def run(self, entry: Entry, rate: float, seed: int, *, tuning: bool = False) -> Run:
        backbone, experiment = self.backbone, self.backbone.experiment
        key = RunKey(
            backbone.name, entry.name, rate, seed, backbone.steps, backbone.batch_size,
            memtl.__version__,
        )  # fmt: skip
        found = self.runs.find(key)
        if found is not None:
            return found
        curve: list[float] = []
        first = slice(backbone.watched)
        watched = Split(self.task.val.images[first], self.task.val.labels[first])

        def watch(model: Any, steps: int) -> None:
            if steps % backbone.every == 0:
                curve.append(evaluate(model, watched, metric=self.task.metric))

        try:
            val, test, _ = train(
                experiment, self.task, entry.method, learning_rate=rate, seed=seed,
                steps=backbone.steps, test=not tuning, watch=None if tuning else watch,
            )  # fmt: skip
        except FloatingPointError:
            if not tuning:
                raise
            val, test = 0.0, float("nan")  # it diverged: not the rate to take
        found = Run(key, val, None if tuning else test, curve)
        self.runs.add(found)
        what = f"rate {rate:g}" if tuning else f"seed {seed}"
        self.say(f"{backbone.name:5} {entry.name:27} {what:10} {100 * val:5.1f} % of validation")
        return found


def _footprint(backbone: Backbone, name: str) -> tuple[int, int | None, int]:
    entry = next(e for e in entries(backbone) if e.name == name)
    (result,) = measure(backbone.experiment, backbone.load_task(), [entry.method], 1, "cpu", False)
    return result.saved_bytes, result.peak_bytes, result.trainable


def steps_to(backbone: Backbone, curves: list[list[float]]) -> float | None:
    """Mean over runs of the steps until the target was seen; None where a run never got there."""
    reached = []
    for curve in curves:
        places = [i for i, accuracy in enumerate(curve, 1) if accuracy >= backbone.target]
        if not places:
            return None
        reached.append(places[0] * backbone.every)
    return statistics.fmean(reached)


def small(backbone: Backbone) -> Backbone:
    """A budget to try the code out on."""
    return dataclasses.replace(
        backbone, steps=2, batch_size=4, every=1, watched=8, most=16, target=0.0
    )


QUICK = tuple(map(small, BACKBONES))
