"""A run: settings in, a folder of results out; called again, it goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..files import write_aside
from ..nn.report import plain_name
from ..report import environment
from ..training import Step, seeded, track
from ..training.metrics import metric_named
from . import build, folder
from .average import Average
from .interrupt import Interrupt, Stopped
from .order import Batches, Order, loader, mixed
from .ranks import Ranks, like, whole
from .records import Records
from .results import Score, cost, counted, evaluated
from .settings import RunSettings
from .state import Checkpoint, Checkpoints

if TYPE_CHECKING:
    from .data import Data, Samples

QUIET = 10.0
"""Seconds between lines where there is no bar; in a long run a 20th of the time so far."""

Say = Callable[[str], None]


class Interrupted(Exception):
    """A run was told to end; it is saved. ``signal`` is the signal, ``step`` where it will go
    on."""

    def __init__(self, signal: int, step: int):
        super().__init__(f"interrupted after step {step}")
        self.signal, self.step = signal, step


def train(
    settings: RunSettings,
    out: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    data: Data | None = None,
    fresh: bool = False,
    say: Say | None = print,
) -> dict[str, Any]:
    """Train, evaluate, and leave in ``out``:

    - ``run.yaml``, the settings; ``metrics.jsonl`` and ``metrics.csv``, a line a step;
    - ``checkpoints``, from which the same call goes on, bit for bit on a CPU, whenever its process
      was killed;
    - at the end ``model.safetensors``, the best weights, and ``summary.json``.

    What a step draws at random (dropout, augmentation, the order of the data) is a function of the
    seed and its number, so checkpoints hold no state of a generator.

    Args:
        settings: of the run.
        out: a folder, which is made; that of the same run earlier, which goes on.
        model: instead of the network that the settings name: before any method was applied.
        data: instead of the data that the settings name.
        fresh: delete what an earlier run left in ``out``.
        say: is given lines for people; None says nothing.

    Returns:
        What is in ``summary.json``.

    Raises:
        ValueError: ``out`` is another run's: the message names the settings that differ; or the
            model, data or settings do not go together.
        FloatingPointError: the loss is not finite.
        Interrupted: Ctrl-C or SIGTERM came; the run is saved.
    """
    out = Path(out)
    ranks = Ranks.join(settings.device)
    say = say if say is not None and ranks.first else _silent
    with contextlib.ExitStack() as stack:
        if ranks.first:
            stack.enter_context(folder.held(out))
            folder.begin(out, settings, fresh)
        done = ranks.from_first(folder.summary(out) if ranks.first else None)
        if done is not None:
            say(f"{out} is finished: another --out or --fresh for another run")
            return done
        stack.enter_context(_random(settings.seed, ranks.device))
        run = _Run(settings, out, ranks, model, data, say)
        run.train()
        return run.finish()


class _Run:
    """What a run has at hand; training goes on from its checkpoint."""

    def __init__(
        self,
        settings: RunSettings,
        out: Path,
        ranks: Ranks,
        model: nn.Module | None,
        data: Data | None,
        say: Say,
    ):
        self.settings, self.out, self.ranks, self.say = settings, out, ranks, say
        data = build.open_data(settings, model) if data is None else data
        self.data = data
        if not len(data.train) or not len(data.val):
            raise ValueError("there must be at least one sample to train on, and one to evaluate")
        metric_named(data.metric)  # before the run, not after it
        self.recipe = settings.training(len(data.train), ranks.world)
        self.order = Order(
            len(data.train), settings.batch_size, settings.accumulate, ranks.rank, ranks.world,
            settings.seed,
        )  # fmt: skip
        epoch = math.ceil(self.order.samples / self.order.a_step)
        self.eval_every = settings.eval_every or epoch
        self.save_every = settings.save_every or epoch
        torch.manual_seed(settings.seed)
        model = build.create_model(settings, len(data.classes)) if model is None else model
        # `model` has the weights, `trained` the wrapper around it that exchanges gradients.
        self.model = build.prepare(model, settings).to(ranks.device).train()
        if ranks.world > 1 and hasattr(model, "memtl_loss"):
            raise ValueError("a model with an objective of its own trains in one process")
        self.checkpoints = Checkpoints(out / folder.CHECKPOINTS, settings.keep)
        found = self.checkpoints.latest()
        for path in self.checkpoints.damaged:
            say(f"{path} is damaged: going on from the checkpoint before it")
        if found is not None:
            self._check(found)
            self.model.load_state_dict(found.under("model"))
        if settings.compile:
            self.model.compile()
        self.trained = ranks.spread(self.model, settings.fsdp)
        self.interrupt = Interrupt(again=ranks.world == 1)
        self.stopping = False
        self.step = Step(
            self.trained, self.recipe, precision=settings.precision, average=self._average
        )
        self.ema = None if settings.ema is None else Average(self.model, settings.ema)
        self.best: Score | None = None
        self.owed = False  # a score, of which an interrupt was in the way
        if found is not None:
            self._restore(found)

    def train(self) -> None:
        """Do the steps that are left."""
        settings, recipe, say = self.settings, self.recipe, self.say
        first, last = self.step.done, recipe.steps
        if not self.ranks.first:
            log = None
        else:
            columns = ("epoch", "loss", "learning_rate", "seconds", "samples_per_second",
                       "val_loss", f"val_{self.data.metric}")  # fmt: skip
            log = Records(self.out, columns, first, settings.tensorboard, not self.owed)
        say(self._beginning() if not first else f"going on after step {first} of {last}")
        batches = iter(
            loader(self.data.train, Batches(self.order, first, last), settings.workers,
                   self.ranks.device)
        )  # fmt: skip
        shown = False if not self.ranks.first or say is _silent else None
        with contextlib.ExitStack() as stack:
            if log is not None:
                stack.callback(log.close)
            stack.enter_context(self.interrupt)
            bar = stack.enter_context(
                track(range(first, last), "training", progress=shown, total=last, initial=first)
            )
            if self.owed:
                epoch = first * self.order.a_step / self.order.samples
                self._evaluate_and_save(first, epoch, log, bar)
                self._end_if_interrupted(first)
            said = started = began = time.perf_counter()
            for number in bar:
                parts = [self._placed(*next(batches)) for _ in range(settings.accumulate)]
                seed_everything(mixed(settings.seed, "step", number, self.ranks.rank))
                loss = self.step.over(parts)
                if self.ema is not None:
                    self.ema.update(self.step.done)
                ended = time.perf_counter()
                row = {
                    "step": number + 1,
                    "epoch": (number + 1) * self.order.a_step / self.order.samples,
                    "loss": loss,
                    "learning_rate": recipe.rate(number),
                    "seconds": ended - started,
                    "samples_per_second": self.order.a_step / (ended - started),
                }
                started = ended
                if log is not None:
                    log.add(row)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if bar.disable and ended - said >= max(QUIET, (ended - began) / 20):
                    left = (ended - began) / (number + 1 - first) * (last - number - 1)
                    say(f"step {number + 1} of {last}: loss {loss:.4f}, "
                        f"{row['samples_per_second']:.1f} samples/s, "
                        f"about {tqdm.format_interval(left)} left")  # fmt: skip
                    said = ended
                if self._evaluate_and_save(number + 1, row["epoch"], log, bar):
                    started = time.perf_counter()
                self._end_if_interrupted(number + 1)

    def _end_if_interrupted(self, step: int) -> None:
        if self.stopping:
            raise Interrupted(self.interrupt.signal or 0, step)

    def _evaluate_and_save(self, step: int, epoch: float, log: Records | None, bar: Any) -> bool:
        """What is due after that many steps; whether anything was. Every process comes here."""
        last = step == self.recipe.steps
        best = False
        evaluating = last or step % self.eval_every == 0
        self.owed = False
        if evaluating:
            try:
                with contextlib.nullcontext() if self.ema is None else self.ema.inside():
                    score, loss = self._scored(self.data.val, self._interrupted)
            except Stopped:
                self.stopping = self.owed = True
        if evaluating and not self.owed:
            if best := self.best is None or score > self.best.score:
                self.best = Score(score, step)
            value = None if math.isnan(loss) else loss
            row = {"step": step, "epoch": epoch, "val_loss": value,
                   f"val_{self.data.metric}": score}  # fmt: skip
            if log is not None:
                log.add(row)
            text = f"step {step}: val {self.data.metric} {score:.4f}"
            bar.clear()
            self.say(text + ("" if value is None else f", loss {loss:.4f}"))
        if saving := best or last or self.stopping or step % self.save_every == 0:
            if log is not None:
                log.flush()  # before the checkpoint that counts on them
            self._save(step, best)
        return evaluating or saving

    def _beginning(self) -> str:
        settings, recipe, order = self.settings, self.recipe, self.order
        trained = sum(p.numel() for p in self.step.parameters)
        passes = recipe.steps * order.a_step / order.samples
        data, shown = self.data, 8
        more = f" and {len(data.classes) - shown} more" if len(data.classes) > shown else ""
        test = f"{len(data.test)} to test on" if data.test is not None else "no test split"
        return (
            f"{settings.model} on {settings.data}, {settings.methods}: {recipe.steps} steps of "
            f"{order.a_step} samples, {passes:.3g} epochs of {order.samples}; {trained:,} of "
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters train\n"
            f"{len(data.train)} samples to train on, {len(data.val)} to validate on, {test}; "
            f"{len(data.classes)} classes: {', '.join(data.classes[:shown])}{more}\n"
            f"the run is in {self.out}: ended early, the same call goes on"
        )

    def finish(self) -> dict[str, Any]:
        """Leave the best weights and the summary in the folder; returns the summary."""
        settings, data, out = self.settings, self.data, self.out
        self.ranks.from_first(None)  # has written the last checkpoint
        found = Checkpoints(out / folder.CHECKPOINTS).best()
        assert found is not None and self.best is not None
        own = self.model.state_dict()
        weights = evaluated(found)
        self.model.load_state_dict({name: like(t, own[name]) for name, t in weights.items()})
        test = None if data.test is None else self._scored(data.test)[0]
        spent = cost(
            self.model, data, self.order, self.ranks, settings.precision,
            settings.fsdp and self.ranks.world > 1, out,
        )  # fmt: skip
        trained = sum(p.numel() for p in self.step.parameters)
        summary = {
            "model": settings.model,
            "data": settings.data,
            "method": settings.methods,
            "classes": list(data.classes),
            "kind": data.kind,
            "metric": data.metric,
            "val_score": self.best.score,
            "best_step": self.best.step,
            "test_score": test,
            "steps": self.recipe.steps,
            "trained_parameters": trained,
            **dataclasses.asdict(spent),
            "processes": self.ranks.world,
            "settings": settings.to_dict(),
            "environment": environment(self.ranks.device),
        }
        if self.ranks.first:
            from safetensors.torch import save_file

            write_aside(out / folder.WEIGHTS, lambda aside: save_file(weights, aside))
            text = json.dumps(summary, indent=2) + "\n"
            write_aside(out / folder.SUMMARY, lambda aside: aside.write_text(text))
        return summary

    def _interrupted(self) -> bool:
        return self.stopping or self.interrupt.signal is not None

    def _scored(self, samples: Samples, stop: Callable[[], bool] = bool) -> tuple[float, float]:
        """The score on samples, by the metric of the data, and the mean cross-entropy."""
        settings = self.settings
        counts, loss = counted(
            self.model, samples, self.data, self.ranks, batch_size=settings.batch_size,
            workers=settings.workers, precision=settings.precision,
            sharded=settings.fsdp and self.ranks.world > 1, stop=stop,
        )  # fmt: skip
        return metric_named(self.data.metric)(counts), loss

    def _placed(self, images: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """A batch where the model is."""
        images = images.to(self.ranks.device, non_blocking=True)
        if self.settings.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels.to(self.ranks.device, non_blocking=True)

    def _average(self, loss: float) -> float:
        """The mean loss of all processes, who agree here on whether to stop."""
        stop = float(self.interrupt.signal is not None)
        total, stopping = self.ranks.sum(torch.tensor([loss, stop], dtype=torch.float64)).tolist()
        self.stopping = stopping > 0
        return total / self.ranks.world

    def _save(self, step: int, best: bool) -> None:
        """Every process gives its part, the first one writes."""
        tensors = {f"model/{n}": whole(t) for n, t in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"average/{n}": whole(t) for n, t in self.ema.tensors.items()}
        state = self.step.state_dict()
        numbers: dict[str, dict[str, Any]] = {}
        for name, values in state["optimizer"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = whole(value)
                else:
                    numbers.setdefault(name, {})[key] = value
        if not self.ranks.first:
            return
        facts = {
            "world": self.ranks.world,
            "samples": self.order.samples,
            "classes": list(self.data.classes),
            "scaler": state["scaler"],
            "optimizer": numbers,
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "owed": self.owed,
        }
        self.checkpoints.save(step, tensors, facts, best=best)

    def _check(self, found: Checkpoint) -> None:
        for name, there, here in (
            ("processes", found.facts["world"], self.ranks.world),
            ("samples of training data", found.facts["samples"], self.order.samples),
        ):
            if there != here:
                raise ValueError(
                    f"{self.out} is a run on {there} {name}, not on {here}: go on as it began, "
                    "choose another --out, or --fresh to begin again"
                )

    def _restore(self, found: Checkpoint) -> None:
        """All but the weights, which the model has already."""
        own = {plain_name(name): p for name, p in self.model.named_parameters()}
        state: dict[str, dict[str, Any]] = {
            name: dict(values) for name, values in found.facts["optimizer"].items()
        }
        for path, t in found.under("optimizer").items():
            name, _, key = path.rpartition("/")
            state.setdefault(name, {})[key] = like(t, own[name])
        self.step.load_state_dict(
            {"done": found.step, "scaler": found.facts["scaler"], "optimizer": state}
        )
        if self.ema is not None:
            averages = found.under("average")
            self.ema.load({n: like(t, self.ema.tensors[n]) for n, t in averages.items()})
        self.owed = found.facts.get("owed", False)
        best = found.facts["best"]
        self.best = None if best is None else Score(**best)


def seed_everything(seed: int) -> None:
    """Give torch, on every device, Python and numpy the random numbers of ``seed``."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def _random(seed: int, device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, afterwards every generator is as before."""
    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with seeded(seed, device):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)


def _silent(_: str) -> None:
    """Say nothing."""
