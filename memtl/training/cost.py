"""What a step costs: the bytes it keeps for backward, its peak, its time."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import memory
from .loop import Settings, Step, loss_of, seeded
from .progress import track


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train whose cost is measured.

    Args:
        build: makes the model, afresh each time.
        images: one batch of what it takes, on the model's device.
        labels: their classes, there too.
    """

    build: Callable[[], nn.Module]
    images: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one batch: bytes saved for backward, the peak (None: see :func:`memory.peak_bytes`) of
    forward and backward, the seconds of a whole step; and how many parameters train."""

    saved_bytes: int
    peak_bytes: int | None
    seconds_per_step: float
    trainable: int


def costs(
    ways: Sequence[Way], rounds: int, *, optimizer: str = "adamw", progress: bool | None = None
) -> list[Cost]:
    """What each way keeps, needs at its peak, and takes, before any training.

    Times are medians of ``rounds`` whole steps (forward, loss, backward, optimiser), the ways
    taking turns, so that a slow moment of the machine strikes all of them; the learning rate is too
    small for any of them to diverge.
    """
    with memory.freed_memory_returned():  # memory first: see there
        footprints = [_footprint(way) for way in track(ways, "measuring memory", progress=progress)]
    settings = Settings(rounds + 2, learning_rate=1e-6, optimizer=optimizer)
    steps = [Step(way.build(), settings) for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in track(range(rounds + 2), "measuring time", progress=progress):
        for way, step, times in zip(ways, steps, seconds, strict=True):
            started = time.perf_counter()
            step(way.images, way.labels)
            if way.images.is_cuda:
                torch.cuda.synchronize(way.images.device)
            times.append(time.perf_counter() - started)
    return [
        Cost(*footprint, statistics.median(times[2:]), sum(p.numel() for p in step.parameters))
        for footprint, step, times in zip(footprints, steps, seconds, strict=True)
    ]


def _footprint(way: Way) -> tuple[int, int | None]:
    """Bytes that one batch saves for backward, and the peak of its forward and backward."""
    model = way.build()

    def loss() -> Tensor:
        with seeded(0, way.images.device):  # what an objective draws is the same for all ways
            return loss_of(model, way.images, way.labels)

    loss().backward()  # gradients and one-time buffers are there before anything counts
    with memory.SavedTensors(model) as tensors:
        kept = loss()
    saved = tensors.bytes
    del kept, tensors
    return saved, memory.peak_bytes(lambda: loss().backward(), way.images.device)
