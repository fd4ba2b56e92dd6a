"""Handwritten digits that need no download: the 1797 images shipped inside scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtl.tasks.split import Split

MEAN = 0.305
"""Mean ink of the digits, with blank paper 0 and full ink 1. Every memtl task subtracts it."""

STD = 0.376
"""Standard deviation of the ink of the digits. Every memtl task divides by it."""

SPLIT_SEED = 20220131
"""Seed of the stratified split; changing it would make published figures incomparable."""

SPLIT_SIZES = (1000, 300, 497)
"""Number of images in the train, validation and test splits."""


@dataclass(frozen=True)
class Task:
    """A classification task held in memory.

    Attributes:
        name: Short name, for tables and logs.
        num_classes: Number of distinct labels.
        train: Images to learn from.
        val: Images to choose hyper-parameters on.
        test: Images to report on, once.
        metric: How it is scored: one of :data:`memtl.training.METRICS`, or another name where the
            task has an ``evaluate`` of its own.
        evaluate: Of a model and a split, the score, where counts of classes do not tell it.
        head: What a pre-trained encoder needs on top: ``"classifier"``, ``"regressor"``,
            ``"spans"`` or ``"mlm"``.
    """

    name: str
    num_classes: int
    train: Split
    val: Split
    test: Split
    metric: str = "accuracy"
    evaluate: Callable[[nn.Module, Split], float] | None = None
    head: str = "classifier"


def normalise(ink: Tensor) -> Tensor:
    """Map ink, 0 for blank paper to 1 for full ink, to what the models see (any shape)."""
    return (ink - MEAN) / STD


def load_digits(size: int = 32, *, normalised: bool = True) -> Task:
    """Return scikit-learn's handwritten digits, enlarged and split 1000 / 300 / 497.

    The 8x8 images (ink 0 to 16) are scaled to 0..1, resized bilinearly with antialiasing, and
    normalised by the fixed :data:`MEAN` and :data:`STD`. The split is stratified by digit and
    always the same (:data:`SPLIT_SEED`).

    Args:
        size: Height and width of the images, in pixels.
        normalised: False leaves the ink in 0..1, for a model that normalises it
            (:class:`memtl.models.Normalized`).

    Returns:
        A task of 10 classes whose images are ``[n, 1, size, size]`` float32.

    Raises:
        TypeError: If ``size`` is not an int.
        ValueError: If ``size`` is less than 1.
        ImportError: If scikit-learn is not installed.
    """
    images, labels = source(size, normalised=normalised)
    train, val, test = (Split(images[i], labels[i]) for i in stratified(labels, SPLIT_SIZES))
    return Task("digits", 10, train, val, test)


def source(size: int, *, normalised: bool = True) -> tuple[Tensor, Tensor]:
    """All 1797 images, as :func:`load_digits` makes them and raising as it does, and labels."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"size must be an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits task needs scikit-learn: pip install memtl[demo]") from error
    digits = datasets.load_digits()
    ink = torch.from_numpy(digits.images).to(torch.float32)[:, None] / 16
    ink = F.interpolate(ink, size=(size, size), mode="bilinear", antialias=True)
    ink = ink.clamp(0, 1)  # which rounding may leave
    return normalise(ink) if normalised else ink, torch.from_numpy(digits.target).to(torch.int64)


def stratified(labels: Tensor, sizes: tuple[int, int, int]) -> list[Sequence[int]]:
    """Positions of three splits of those sizes, which add up to all, by :data:`SPLIT_SEED`."""
    from sklearn import model_selection

    def cut(indices: Sequence[int], first: int, second: int) -> list[Sequence[int]]:
        return model_selection.train_test_split(
            indices,
            train_size=first,
            test_size=second,
            stratify=labels[indices],
            random_state=SPLIT_SEED,
        )

    first, second, third = sizes
    chosen, rest = cut(range(len(labels)), first, second + third)
    return [chosen, *cut(rest, second, third)]
