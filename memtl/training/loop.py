"""The loop: linear warm-up and a cosine, and a record of every step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.report import plain_name
from ..tasks import Split, Task
from .metrics import check_labels, count, metric_named
from .progress import track

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train; every value is validated here, so that a long run cannot fail on it later.

    Args:
        steps: optimiser steps.
        batch_size: images a step. Every batch is full: an epoch's rest joins the next epoch.
        learning_rate: its peak, reached after the warm-up; a cosine takes it to 0 from there.
        warmup: fraction of the steps over which the learning rate rises linearly.
        weight_decay: for weights alone: vectors (biases, norms) are not decayed. AdamW's is apart
            from the gradient; Adam's and SGD's is an L2 penalty, a part of it.
        optimizer: one of :data:`OPTIMIZERS`; SGD has a momentum of 0.9.
        epoch_steps: steps of an epoch, to go by epochs: the learning rate is the same in all steps
            of one, and an epoch's rest is a smaller batch of its own.
        label_smoothing: probability mass spread over all classes.
        clip_norm: gradients of a greater norm are scaled down to it; None leaves them alone.
        seed: of the order of the data, and of dropout.

    Raises:
        ValueError: a value outside its range.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    optimizer: str = "adamw"
    epoch_steps: int | None = None
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("warmup", 0 <= self.warmup <= 1, "in [0, 1]"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            (
                "epoch_steps",
                self.epoch_steps is None or self.epoch_steps >= 1,
                "at least 1 or None",
            ),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "positive or None"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The learning rate of one step, counted from 0."""
        unit = self.epoch_steps or 1
        now, end = step // unit, math.ceil(self.steps / unit)
        rising = max(1, round(self.warmup * end))
        if now < rising:
            return self.learning_rate * (now + 1) / rising
        done = (now - rising) / max(1, end - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclasses.dataclass(frozen=True)
class History:
    """What a run was: the loss and the duration of every step, and the score at its end (NaN where
    there was nothing to evaluate on)."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    val_score: float

    @property
    def seconds_per_step(self) -> float:
        """Median duration, the first steps (five, or half of a short run) left out."""
        return statistics.median(self.seconds[min(5, len(self.seconds) // 2) :])


def loss_of(
    model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """The cross-entropy of what the model gives; of a model with a ``memtl_loss`` what that gives,
    since not every objective has a class for each sample (:class:`memtl.models.bert.MaskedLM`)."""
    own: Any = getattr(model, "memtl_loss", None)
    if own is not None:
        return own(images, labels)
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


Objective = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
"""Of a model, images, labels and label smoothing, the loss."""


PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What a forward computes in: by autocast, unless it is fp32."""


class Step:
    """Training, one step a call: forward, loss, backward, optimiser. Calling it returns the loss
    that ``objective`` gives, to which ``penalty``, a function of the weights, is added.

    Args:
        precision: one of :data:`PRECISIONS`; under "fp16" a GradScaler leaves out the steps whose
            gradients overflow.
        average: of this process's loss, the mean over all processes.

    Raises:
        ValueError: no parameter of ``model`` requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        penalty: Callable[[], Tensor] | None = None,
        objective: Objective = loss_of,
        *,
        precision: str = "fp32",
        average: Callable[[float], float] = float,
    ):
        self.model = model
        self.penalty = penalty
        self.objective = objective
        self.settings = settings
        self.average = average
        self.done = 0
        named = {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        if not self.parameters:
            raise ValueError(f"no parameter of this {type(model).__name__} requires a gradient")
        kind = self.parameters[0].device.type
        self.autocast = functools.partial(
            torch.autocast, kind, PRECISIONS[precision], enabled=precision != "fp32"
        )
        self.scaler = torch.amp.GradScaler(kind, enabled=precision == "fp16")
        # Names as the optimizer counts: weights first, then vectors.
        self._names = [n for n, p in named.items() if p.ndim > 1]
        self._names += [n for n, p in named.items() if p.ndim <= 1]
        groups = [
            {
                "params": [p for p in self.parameters if p.ndim > 1],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = OPTIMIZERS[settings.optimizer]([g for g in groups if g["params"]], lr=0.0)

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        """Raises FloatingPointError, before any weight is touched, where the loss is not finite."""
        return self.over([(images, labels)])

    def over(self, parts: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One step on the mean of the losses of several parts, one after the other in memory; as a
        call raises."""
        settings = self.settings
        rate = settings.rate(self.done)
        self.optimizer.zero_grad()
        losses = []
        for number, (images, labels) in enumerate(parts, 1):
            with _apart(self.model) if number < len(parts) else contextlib.nullcontext():
                with self.autocast():
                    loss = self.objective(self.model, images, labels, settings.label_smoothing)
                    if self.penalty is not None:
                        loss = loss + self.penalty()
                losses.append(loss.detach())
                self.scaler.scale(loss / len(parts)).backward()
        value = self.average(torch.stack(losses).mean().item())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.done + 1} of {settings.steps} (learning rate "
                f"{rate:.3g}): lower the learning rate, clip gradients, or look at the data"
            )
        if settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1
        return value

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on besides the weights: ``done``, ``scaler``, and under
        ``optimizer`` what that keeps of every parameter, by the parameter's name."""
        state = self.optimizer.state_dict()["state"]
        kept = {self._names[number]: dict(values) for number, values in state.items()}
        return {"done": self.done, "scaler": self.scaler.state_dict(), "optimizer": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the step was whose :meth:`state_dict` this is.

        Raises:
            ValueError: it is of other parameters.
        """
        kept = state["optimizer"]
        if kept and (other := sorted(set(kept) ^ set(self._names))):
            raise ValueError(
                f"the optimizer's state does not fit this model: {other[0]!r} trains in one of "
                f"them alone ({len(other)} such parameters)"
            )
        whole = self.optimizer.state_dict()
        whole["state"] = {i: dict(kept[n]) for i, n in enumerate(self._names) if n in kept}
        self.optimizer.load_state_dict(whole)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.done = state["done"]


def _apart(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, a backward leaves gradients in this process: those of the last part are exchanged,
    with what has added up before."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def fit(
    model: nn.Module,
    train: Split,
    val: Split | None,
    settings: Settings,
    *,
    metric: str = "accuracy",
    penalty: Callable[[], Tensor] | None = None,
    objective: Objective = loss_of,
    on_step: Callable[[int], None] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    description: str = "training",
) -> History:
    """Train ``model`` in place on ``train``, then evaluate it once on ``val`` where there is one.

    The same model, data and seed give the same run; the global random state is left as it was.

    Args:
        model: returns logits ``[n, C]`` for images ``[n, ...]``, or ``[n, C, H, W]`` where every
            pixel has a label.
        metric: of the evaluation, one of :data:`METRICS`.
        penalty: as in :class:`Step`.
        objective: what is minimised: the cross-entropy, or one of
            :mod:`memtl.training.objectives`.
        on_step: is called after every step, with how many there have been.
        device: where to train; the model is moved there. None: where it is.
        progress: as in :func:`track`; ``description`` is what its bar says.

    Raises:
        ValueError: nothing in ``model`` trains, ``train`` is empty, or its epochs do not have
            ``settings.epoch_steps`` steps; ``metric`` is unknown.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    metric_named(metric)  # before the run, not after it
    if not len(train):
        raise ValueError("train must have at least one image, got none")
    epoch_steps = math.ceil(len(train) / settings.batch_size)
    if settings.epoch_steps not in (None, epoch_steps):
        raise ValueError(
            f"{len(train)} images in batches of {settings.batch_size} are {epoch_steps} steps an "
            f"epoch, but the settings say {settings.epoch_steps}"
        )
    device = _device(model) if device is None else torch.device(device)
    model.to(device).train()
    step = Step(model, settings, penalty, objective)
    losses, seconds = [], []
    with seeded(settings.seed, device):
        bar = track(_batches(train, settings), description, progress=progress, total=settings.steps)
        with bar:
            started = time.perf_counter()
            for images, labels in bar:
                losses.append(step(images.to(device), labels.to(device)))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                ended = time.perf_counter()
                seconds.append(ended - started)
                started = ended
                if on_step is not None:
                    on_step(step.done)
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    score = math.nan if val is None else evaluate(model, val, metric=metric)
    return History(tuple(losses), tuple(seconds), score)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Random numbers, on the CPU and on ``device``, are those of ``seed``; afterwards as before."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in evaluation mode; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # By train(), for modules that do more in it (merging adapters into weights, say); then each
        # as it was.
        for module, training in before:
            if module.training != training:
                module.train(training)
        for module, training in before:
            module.training = training


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, *, batch_size: int = 256, metric: str = "accuracy"
) -> float:
    """The score of ``model``, in evaluation mode, on ``split``.

    Args:
        model: returns logits ``[n, C]`` where labels are ``[n]``, ``[n, C, H, W]`` where they are
            ``[n, H, W]``; or has a ``memtl_count(images, labels)`` that counts as
            :func:`memtl.training.metrics.count` does.
        batch_size: images at a time.
        metric: one of :data:`METRICS`; the accuracy is the fraction of samples, or pixels, that are
            classified correctly.

    Raises:
        ValueError: ``split`` is empty, ``metric`` unknown, logits and labels do not fit, or a label
            is not in ``0 .. C - 1``.
    """
    score = metric_named(metric)
    if not len(split):
        raise ValueError("cannot evaluate on an empty split")
    batches = zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)
    return score(tally(model, batches)[0])


@torch.no_grad()
def tally(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> tuple[Tensor, float]:
    """What :func:`memtl.training.metrics.count` counts in all of ``batches``, of ``model`` in
    evaluation mode, on the CPU; and the cross-entropy of a sample, summed over all (NaN for a model
    with a ``memtl_count``, which need not have classes)."""
    device, counts, loss = _device(model), torch.zeros((), dtype=torch.int64), 0.0
    own: Any = getattr(model, "memtl_count", None)
    with evaluating(model):
        for images, labels in batches:
            if own is not None:
                counts, loss = counts + own(images.to(device), labels).cpu(), math.nan
                continue
            logits = model(images.to(device))
            counts = counts + count(logits, labels).cpu()
            labels = check_labels(logits, labels)
            loss += len(labels) * F.cross_entropy(logits.float(), labels).item()
    return counts, loss


def score(model: nn.Module, task: Task, split: Split) -> float:
    """The score of ``model`` on a split of ``task``, as the task says."""
    if task.evaluate is not None:
        return task.evaluate(model, split)
    return evaluate(model, split, metric=task.metric)


def _batches(split: Split, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches: every image once, in random order, before any comes again."""
    generator = torch.Generator().manual_seed(settings.seed)
    queue = torch.empty(0, dtype=torch.int64)
    least = settings.batch_size if settings.epoch_steps is None else 1
    for _ in range(settings.steps):
        while len(queue) < least:
            queue = torch.cat([queue, torch.randperm(len(split), generator=generator)])
        index, queue = queue[: settings.batch_size], queue[settings.batch_size :]
        yield split.images[index], split.labels[index]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
