"""What a run is, and the journal of those that are finished."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..report import Journal


@dataclasses.dataclass(frozen=True)
class Key:
    """What tells a run from others: the data, the network, the method, and how it was trained.

    ``data`` tells images and lists (:attr:`VtabTask.data`), ``weights`` the pre-trained weights;
    ``method`` is a name, which stands for its options; ``learning_rate`` is that of the grid, for a
    batch of 256; ``memtl`` is the version.

    It does not cover the versions of torch, timm and peft, the device, or whether features came
    from a cache, which may all change the last digits; nor code that was changed without a new
    version. After such a change, choose another folder.
    """

    dataset: str
    data: str
    model: str
    weights: str
    method: str
    phase: str
    learning_rate: float
    weight_decay: float
    seed: int
    epochs: int
    batch_size: int
    memtl: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: the accuracy at its end, or None and the error that ended it; its time."""

    key: Key
    accuracy: float | None
    error: str | None
    seconds: float


class Runs(Journal[Run]):
    """The journal of finished runs in that file."""

    def __init__(self, path: Path):
        super().__init__(path, Run)
