"""A run that takes a second: a few images that tell their class, and a small network."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from memtl.runs import RunSettings

CLASSES = ("dark", "middle", "bright")


@dataclasses.dataclass(frozen=True)
class Blobs:
    """Images, each bright in a row that its class is; with a seed there is noise on them."""

    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, Tensor]:
        label = index % 3
        image = _noise(1000 * self.seed + index)
        image[0, label] += 2
        if seed is not None:
            image = image + 0.3 * _noise(seed)
        return image, torch.tensor(label)


def _noise(seed: int) -> Tensor:
    return 0.7 * torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Data:
    """What `memtl.runs.data.open_data` returns."""

    train: Blobs
    val: Blobs
    test: Blobs | None = None
    classes: tuple[str, ...] = CLASSES
    metric: str = "accuracy"
    kind: str = "image"


def data(count: int = 30, test: int = 12) -> Data:
    return Data(Blobs(count, 1), Blobs(15, 2), Blobs(test, 3) if test else None)


def network(norm: bool = True, dropout: float = 0.2, seed: int = 0) -> nn.Module:
    """With what a resume has to keep: running statistics, and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        )


def settings(**fields: object) -> RunSettings:
    """Of a run of a few steps."""
    base = {"model": "small", "data": "blobs", "steps": 12, "batch_size": 8, "device": "cpu",
            "eval_every": 4, "save_every": 2, "learning_rate": 0.01}  # fmt: skip
    return RunSettings(**{**base, **fields})
