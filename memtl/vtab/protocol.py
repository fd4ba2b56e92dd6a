"""The published protocol on one dataset: search, choose, train again with several seeds, test."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

import memtl

from ..tasks import Split, VtabTask
from ..training import Settings, evaluate, fit, seeded
from .method import Method
from .runs import Key, Run, Runs

Candidate = tuple[float, float]
"""A learning rate and a weight decay."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A method on a dataset. ``chosen`` and ``val_accuracy`` are None where every candidate of the
    search diverged; an accuracy is None where that run did; ``diverged`` counts all that did."""

    method: str
    dataset: str
    group: str
    chosen: Candidate | None
    val_accuracy: float | None
    accuracies: tuple[float | None, ...]
    diverged: int

    @property
    def tested(self) -> tuple[float, ...]:
        """The accuracies on the test split, one a seed; none unless every run has one."""
        found = tuple(a for a in self.accuracies if a is not None)
        return found if len(found) == len(self.accuracies) else ()

    @property
    def mean(self) -> float | None:
        """Over the seeds, or None where there is no accuracy of each."""
        return statistics.fmean(self.tested) if self.tested else None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How every method is trained: Adam, weight decay as an L2 penalty on all but vectors, a linear
    warm-up over a tenth of the epochs, then a cosine; the learning rate changes once an epoch and
    is that of the grid x ``batch_size`` / 256. The defaults are VQT's.

    The published code differs in details: it warms up from 0, so that its first epoch changes
    nothing (here the warm-up's last epoch has the full rate); it decays norms, and all biases but
    the last layer's; and it skips a batch whose loss is not finite, where a run ends here.

    Raises:
        ValueError: a value outside its range.
    """

    epochs: int = 100
    batch_size: int = 128
    seeds: tuple[int, ...] = (42, 44, 82, 100, 800)
    search_seed: int = 100

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more, each once, got {list(self.seeds)}")

    def settings(self, images: int, candidate: Candidate, seed: int) -> Settings:
        """Those of one training on so many images."""
        epoch_steps = math.ceil(images / self.batch_size)
        return Settings(
            steps=self.epochs * epoch_steps,
            batch_size=self.batch_size,
            learning_rate=candidate[0] / 256 * self.batch_size,
            weight_decay=candidate[1],
            optimizer="adam",
            epoch_steps=epoch_steps,
            seed=seed,
        )

    def run(
        self,
        task: VtabTask,
        method: Method,
        runs: Runs,
        *,
        model: str,
        weights: str,
        device: torch.device | str = "cpu",
        save: Callable[[nn.Module, Key], object] | None = None,
        progress: bool | None = None,
    ) -> Outcome:
        """Do what ``runs`` does not have yet of a method on a dataset.

        Args:
            model, weights: of the network that ``method`` builds, for the keys of the runs.
            save: called with every model that is trained to be tested.
        """

        done: list[Run] = []

        @functools.cache
        def data(name: str) -> Split:
            return prepared(method, task, name, device)

        def accuracy(phase: str, candidate: Candidate, seed: int) -> float | None:
            key = Key(
                task.name, task.data, model, weights, method.name, phase, *candidate, seed,
                self.epochs, self.batch_size, memtl.__version__,
            )  # fmt: skip
            found = runs.find(key)
            if found is None:
                found = self._train(key, task.num_classes, method, data, device, save, progress)
                runs.add(found)
            done.append(found)
            return found.accuracy

        scores = {c: accuracy("search", c, self.search_seed) for c in method.grid}
        chosen = choose(scores)
        accuracies = tuple(chosen and accuracy("final", chosen, seed) for seed in self.seeds)
        return Outcome(
            method.name,
            task.name,
            task.group,
            chosen,
            chosen and scores[chosen],
            accuracies,
            sum(run.error is not None for run in done),
        )

    def _train(
        self,
        key: Key,
        num_classes: int,
        method: Method,
        data: Callable[[str], Split],
        device: torch.device | str,
        save: Callable[[nn.Module, Key], object] | None,
        progress: bool | None,
    ) -> Run:
        started = time.perf_counter()
        names = {"search": ("train", "val"), "final": ("trainval", "test")}[key.phase]
        train, tested = map(data, names)
        candidate = (key.learning_rate, key.weight_decay)
        settings = self.settings(len(train), candidate, key.seed)
        model = method.build(num_classes, key.seed)
        description = f"{key.dataset}, {key.method}, {key.phase}"
        accuracy, failure = None, None
        try:
            fit(
                model, train, None, settings, device=device, progress=progress,
                description=description,
            )  # fmt: skip
            if method.finish is not None:
                with seeded(key.seed, device):
                    model = method.finish(model, train, settings)
            accuracy = evaluate(model, tested)
            if save is not None and key.phase == "final":
                save(model, key)
        except FloatingPointError as error:
            failure = str(error)
        return Run(key, accuracy, failure, time.perf_counter() - started)


def prepared(method: Method, task: VtabTask, name: str, device: torch.device | str) -> Split:
    """A split of ``task`` as the models of ``method`` take it."""
    split = getattr(task, name)
    if method.prepare_data is None or (name == "test" and not method.prepare_test):
        return split
    return method.prepare_data(method.build(task.num_classes, 0).to(device), split)


def choose(scores: Mapping[Candidate, float | None]) -> Candidate | None:
    """The most accurate candidate; of several the one of the smallest learning rate, then of the
    smallest weight decay. None where all diverged."""
    found = [(score, -rate, -decay) for (rate, decay), score in scores.items() if score is not None]
    if not found:
        return None
    _, rate, decay = max(found)
    return -rate, -decay
