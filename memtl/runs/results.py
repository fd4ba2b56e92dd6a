"""What comes out of a run: scores, the best weights, what they cost."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import memory
from ..models.weights import few
from ..training import PRECISIONS, loss_of, tally
from ..training.metrics import metric_named
from . import build, folder
from .data.samples import Joined
from .interrupt import Stopped
from .order import Order, loader
from .ranks import Ranks
from .records import JSONL, rows
from .state import Checkpoint, Checkpoints

if TYPE_CHECKING:
    from .data import Data, Samples

SPLITS = ("train", "val", "test", "all")
"""What can be evaluated; all of it is as in evaluation, not varied as in training."""
WHICH = ("best", "latest")


@dataclasses.dataclass(frozen=True)
class Score:
    """How good a model was, after which step."""

    score: float
    step: int


def counted(
    model: nn.Module,
    samples: Samples,
    data: Data,
    ranks: Ranks,
    *,
    batch_size: int,
    workers: int = 0,
    precision: str = "fp32",
    sharded: bool = False,
    stop: Callable[[], bool] = bool,
) -> tuple[Tensor, float]:
    """What :func:`memtl.training.metrics.count` counts of ``model`` on ``samples``, and the mean
    cross-entropy (NaN where there is none); each process does its share of the samples.

    Args:
        stop: is asked before every batch whether to give up, which all processes then do; not of
            a sharded model, whose forwards need every process.

    Raises:
        ValueError: there are no samples, or labels do not fit.
        Stopped: ``stop`` said so.
    """
    total = len(samples)
    if not total:
        raise ValueError("cannot evaluate on an empty split")
    mine = [(i, None) for i in range(ranks.rank, total, ranks.world)]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    given: Any = loader(samples, batches, workers, ranks.device)
    if not sharded:
        given = itertools.takewhile(lambda _: not stop(), given)
    with autocast(ranks.device, precision):
        counts, loss = tally(model, given)
        if not counts.ndim:  # no batch
            counts = torch.zeros(3, len(data.classes), dtype=torch.int64)
        if sharded:  # every process takes part in every forward
            most = math.ceil(math.ceil(total / ranks.world) / batch_size)
            for _ in range(most - len(batches)):
                tally(model, loader(samples, [[(0, None)]], 0, ranks.device))
    ended = float(not sharded and stop())
    loss, stopped = ranks.sum(torch.tensor([loss, ended], dtype=torch.float64)).tolist()
    if stopped:
        raise Stopped
    return ranks.sum(counts), loss / total


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """Forwards inside are in that precision."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def evaluated(found: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint that are evaluated: where there is an average, that."""
    return found.under("model") | found.under("average")


def load(
    run: str | os.PathLike[str], *, which: str = "best", model: nn.Module | None = None
) -> nn.Module:
    """The trained model of a run, finished or not, in evaluation mode, on the CPU.

    Args:
        run: its folder.
        which: of its checkpoints, "best" or "latest".
        model: before any method was applied, where the run was given one in Python.

    Raises:
        ValueError: ``run`` is no run's folder, or has no checkpoint; it is damaged; or the weights
            do not fit ``model``.
    """
    return loaded(Path(run), which, model)[0]


def loaded(out: Path, which: str, model: nn.Module | None) -> tuple[nn.Module, Checkpoint]:
    """As :func:`load`, and the checkpoint that it is of."""
    settings = folder.read(out)
    if which not in WHICH:
        raise ValueError(f"which must be one of {WHICH}, got {which!r}")
    there = Checkpoints(out / folder.CHECKPOINTS)
    found = there.best() if which == "best" else there.latest()
    if found is None:
        raise ValueError(f"{out} has no checkpoint yet")
    if model is None:
        # The architecture alone: weights come from the checkpoint.
        plain = dataclasses.replace(settings, pretrained=False)
        model = build.create_model(plain, len(found.facts["classes"]))
    build.prepare(model, dataclasses.replace(settings, checkpointing=False))
    try:
        model.load_state_dict(evaluated(found))
    except RuntimeError as error:
        raise ValueError(f"the weights of {out} do not fit this model: {error}") from None
    return model.eval(), found


def evaluate(
    run: str | os.PathLike[str],
    *,
    split: str | None = None,
    data: str | Data | None = None,
    which: str = "best",
    batch_size: int | None = None,
    device: str = "auto",
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """How good the model of a run is.

    Args:
        run: its folder.
        split: "train", "val", "test" or "all"; None: "test" if there is one, else "val"; where
            ``data`` names other data, that is all of it.
        data: other data than the run's, of the same classes: a name, or the data itself.
        which: of the run's checkpoints, "best" or "latest".
        batch_size: None: the run's.
        device: as of :class:`RunSettings`.
        model: as of :func:`load`.

    Returns:
        The score under the metric's name, ``loss``, and what they are of; ``classes``, of each
        how many ``samples`` it has, how many are ``predicted``, and how many of these ``right``.

    Raises:
        ValueError: as :func:`load`; there is no such split, or the classes are others.
    """
    out = Path(run)
    settings = folder.read(out)
    other = isinstance(data, str) and data != settings.data
    if isinstance(data, str):
        settings = dataclasses.replace(settings, data=data)
    trained, found = loaded(out, which, model)
    opened = build.open_data(settings, model) if data is None or isinstance(data, str) else data
    if list(opened.classes) != found.facts["classes"]:
        raise ValueError(
            f"the classes of the data ({few(opened.classes)}) must be those of the model "
            f"({few(found.facts['classes'])})"
        )
    split = split or ("test" if opened.test is not None else "all" if other else "val")
    parts = {"train": opened.train, "val": opened.val, "test": opened.test}
    there = [part for part in parts.values() if part is not None]
    samples = Joined(tuple(there)) if split == "all" else parts.get(split)
    if samples is None:
        raise ValueError(f"there is no split {split!r}: it must be one of {SPLITS}, and be there")
    ranks = Ranks.join(device)
    counts, loss = counted(
        trained.to(ranks.device), samples, opened, ranks,
        batch_size=batch_size or settings.batch_size, workers=settings.workers,
        precision=settings.precision,
    )  # fmt: skip
    return {
        "run": str(out), "step": found.step, "data": settings.data, "split": split,
        "samples": len(samples), opened.metric: metric_named(opened.metric)(counts), "loss": loss,
        "classes": {
            name: dict(zip(("right", "samples", "predicted"), column, strict=True))
            for name, column in zip(opened.classes, counts.T.tolist(), strict=True)
        },
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What training costs: bytes a sample that autograd keeps for backward (None of a sharded
    model), the peak of memory, and the median duration of a step.

    The peak is of the device's allocator, over the process's life so far, on a GPU; on a CPU the
    growth of the resident set in a forward and backward of one process, None of several.
    """

    saved_bytes_per_sample: float | None
    peak_bytes: int | None
    seconds_per_step: float


def cost(
    model: nn.Module, data: Data, order: Order, ranks: Ranks, precision: str, sharded: bool,
    out: Path,
) -> Cost:  # fmt: skip
    """Measured on the samples that the run began with, and read from its records."""
    times = [row["seconds"] for row in rows(out / JSONL) if "seconds" in row]
    median = statistics.median(times[min(5, len(times) // 2) :])
    if sharded:
        return Cost(None, _allocated(ranks.device), median)
    batch = [(i % order.samples, i) for i in range(order.batch_size)]
    (images, labels), *_ = loader(data.train, [batch], 0, ranks.device)
    images, labels = images.to(ranks.device), labels.to(ranks.device)

    def forward() -> Tensor:
        with autocast(ranks.device, precision):
            return loss_of(model.train(), images, labels)

    with memory.SavedTensors(model) as saved:
        loss = forward()
    kept = saved.bytes / order.batch_size
    del loss, saved
    peak = _allocated(ranks.device)
    if ranks.world == 1 and peak is None:
        peak = memory.peak_bytes(lambda: forward().backward(), ranks.device)
    return Cost(kept, peak, median)


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
