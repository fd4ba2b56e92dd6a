"""A fraction of a split, to learn from less: as even over the classes as can be, or its start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memtl.tasks.split import Images, Split

HOW = ("balanced", "first")


def subset(split: Split, fraction: float, *, seed: int = 0, how: str = "balanced") -> Split:
    """Return ``floor(fraction n)`` of the ``n`` samples of ``split``, in their order in it.

    ``"balanced"`` draws at random, as many of every class as the others have or all there are of
    it, so that numbers differ by more than one only where a class has no more to give. Of the same
    seed a smaller subset lies inside a larger one. ``"first"`` is the beginning of the split, as
    the double-win tickets' code has it (Chen et al., ICML 2022), whatever its classes; the seed
    plays no part.

    Args:
        split: Samples with a label each; images that are read when they are asked for still are.
        fraction: In (0, 1]; 0.29 of 100 are 29, whatever floats make of it.
        seed: Of the draw.
        how: One of :data:`HOW`.

    Raises:
        TypeError: If ``split`` is no :class:`Split`, ``fraction`` no number, ``seed`` not an int,
            or the labels are no whole numbers.
        ValueError: If ``how`` is unknown, ``fraction`` is out of range, ``split`` is empty or has
            no label a sample, or a class of ``split`` would be left empty: the message says which,
            and what fraction is enough.

    Memory: of a tensor of images a copy of those chosen; else their positions alone.
    """
    labels = _checked(split, fraction, seed, how)
    order = torch.arange(len(labels)) if how == "first" else _in_turn(labels, seed)
    count = math.floor(fraction * len(labels) * (1 + 1e-12))  # rounding must not lose a sample
    index = order[:count].sort().values
    if left_out := sorted({*labels.tolist()} - {*labels[index].tolist()}):
        raise ValueError(
            f"{fraction:g} of {len(labels)} samples are {count}, which leaves {_few(left_out)} "
            f"empty: a fraction of {_enough(labels[order])} is the least that does not"
        )
    return select(split, index)


def select(split: Split, index: Tensor) -> Split:
    """The samples of ``split`` at those positions, ``[n]`` int64, in that order.

    Memory: as :func:`subset`.
    """
    images = split.images
    chosen = images[index] if isinstance(images, Tensor) else Selected(images, index)
    return Split(chosen, split.labels[index])


class Selected:
    """Some of the images of another collection, which is asked for them when they are needed.

    Args:
        images: The collection.
        index: ``[n]`` int64, the positions there.
    """

    def __init__(self, images: Images, index: Tensor) -> None:
        self.images = images
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: slice | Tensor, /) -> Any:
        return self.images[self.index[index]]

    def split(self, batch_size: int, /) -> Iterator[Any]:
        """All of them in order, ``batch_size`` at a time, the last batch with what is left."""
        for index in self.index.split(batch_size):
            yield self.images[index]


def _in_turn(labels: Tensor, seed: int) -> Tensor:
    """All positions in an order whose every beginning is balanced: one of each class in turn, the
    samples of a class and the classes of a turn in random order."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    _, classes, counts = labels[shuffled].unique(return_inverse=True, return_counts=True)
    by_class = classes.sort(stable=True)
    turn = torch.empty_like(shuffled)  # of a sample: how many of its class come before it
    turn[by_class.indices] = (
        torch.arange(len(labels)) - (counts.cumsum(0) - counts)[by_class.values]
    )
    place = torch.randperm(len(counts), generator=generator)[classes]
    return shuffled[(turn * len(counts) + place).argsort()]


def _enough(labels: Tensor) -> str:
    """The least fraction, rounded up to six digits, of which every class has a sample, where a
    fraction is that much of the beginning."""
    count = 1 + max((labels == label).nonzero()[0].item() for label in labels.unique())
    return f"{-(-count * 10**6 // len(labels)) / 10**6:.6f}".rstrip("0").rstrip(".")


def _few(labels: list[int]) -> str:
    names = ", ".join(map(str, labels[:10])) + (", ..." if len(labels) > 10 else "")
    return f"{len(labels)} classes ({names})" if len(labels) > 1 else f"class {names}"


def _checked(split: Split, fraction: float, seed: int, how: str) -> Tensor:
    """The labels."""
    if not isinstance(split, Split):
        raise TypeError(f"split must be a Split, got {type(split).__name__}")
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool):
        raise TypeError(f"fraction must be a number, got {type(fraction).__name__}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(HOW)}, got {how!r}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    labels = split.labels
    if labels.is_floating_point():
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must be [n], of at least one sample, got {[*labels.shape]}")
    return labels
