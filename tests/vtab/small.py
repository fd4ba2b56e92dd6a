"""A task and a method so small that a whole protocol takes a moment."""

from __future__ import annotations

import torch
from torch import nn

from memtl.tasks import Split, VtabTask
from memtl.training import seeded
from memtl.vtab import Grid, Method

GRID = Grid((0.5, 0.1), (0.1, 0.0))


def split(n: int, seed: int) -> Split:
    """Three classes of four numbers, each large in a place of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randn(n, 4, generator=generator)
    images[torch.arange(n), labels] += 2
    return Split(images, labels)


def task(name: str = "dtd", group: str = "natural") -> VtabTask:
    train, val = split(20, 1), split(10, 2)
    both = Split(
        torch.cat([train.images, val.images]),  # type: ignore[list-item]
        torch.cat([train.labels, val.labels]),
    )
    return VtabTask(name, group, 3, "blobs", train, val, both, split(30, 3))


def build(num_classes: int, seed: int) -> nn.Module:
    with seeded(seed):
        return nn.Linear(4, num_classes)


METHOD = Method("linear", build, GRID)
KEYS = {"model": "linear", "weights": "none"}
