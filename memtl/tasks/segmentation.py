"""Handwritten digits scattered on a canvas, and the class of every pixel: dense prediction."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memtl.tasks.digits import MEAN, STD, Task, load_digits, normalise
from memtl.tasks.split import Split

DIGITS = (2, 5)
"""Fewest and most digits of a canvas, before some cover others."""

SIDES = (20, 32)
"""Smallest and largest side of a digit, in pixels: 2.5 to 4 times that of scikit-learn's."""

PLACES = 4
"""Random places that are tried for a digit; it goes where the least ink is."""

THRESHOLD = 0.4
"""Ink above which a pixel belongs to a digit, with blank paper 0 and full ink 1."""

SEED = 20220131
"""Of the canvases; changing it would make published figures incomparable."""


def load_digits_segmentation(
    size: int = 64, *, sizes: tuple[int, int, int] = (800, 200, 400)
) -> Task:
    """Return canvases with several of scikit-learn's handwritten digits, of all places and scales.

    Each has :data:`DIGITS` digits, drawn with replacement from the split of :func:`load_digits`
    that has the canvas's name, enlarged bilinearly to :data:`SIDES` pixels. They may touch: a later
    one lies over an earlier one where it has ink. A pixel with ink above :data:`THRESHOLD` is of
    the class of its digit plus 1, any other is background, 0. Always the same (:data:`SEED`): the
    first canvases of a split are those of a smaller one, whatever the other splits.

    Args:
        size: Height and width of the canvases, in pixels.
        sizes: Number of canvases in the train, validation and test splits.

    Returns:
        A task of 11 classes, scored by the mean intersection over union, whose images are
        ``[n, 1, size, size]`` float32 and normalised as the digits are, and whose labels are
        ``[n, size, size]`` int64.

    Raises:
        TypeError: If ``size``, or one of three ``sizes``, is not an int.
        ValueError: If ``size`` is less than the largest digit, or one of ``sizes`` less than 1.
        ImportError: If scikit-learn is not installed.
    """
    _check("size", size, SIDES[1])
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 3:
        raise TypeError(f"sizes must be three ints (train, val, test), got {sizes!r}")
    for name, count in zip(("train", "val", "test"), sizes, strict=True):
        _check(f"the {name} size", count, 1)
    digits = load_digits(size=8)
    splits = (digits.train, digits.val, digits.test)
    train, val, test = (
        compose(split, n, size, torch.Generator().manual_seed(SEED + number))
        for number, (split, n) in enumerate(zip(splits, sizes, strict=True))
    )
    return Task("digit segmentation", 11, train, val, test, metric="mean_iou")


def _check(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def compose(digits: Split, n: int, size: int, generator: torch.Generator) -> Split:
    """Scatter digits on ``n`` canvases.

    Args:
        digits: Normalised images ``[m, 1, 8, 8]`` and labels ``[m]`` to draw from.
        n: Number of canvases.
        size: Their height and width, in pixels.
        generator: CPU generator; its state alone decides what is drawn.

    Returns:
        Normalised images ``[n, 1, size, size]`` and labels ``[n, size, size]``.
    """

    def draw(low: int, high: int) -> int:
        """Uniform in ``low .. high``."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    assert isinstance(digits.images, Tensor)
    source = digits.images * STD + MEAN
    ink = torch.zeros(n, 1, size, size)
    labels = torch.zeros(n, size, size, dtype=torch.int64)
    for canvas, label in zip(ink, labels, strict=True):
        for _ in range(draw(*DIGITS)):
            which, side = draw(0, len(source) - 1), draw(*SIDES)
            places = [(draw(0, size - side), draw(0, size - side)) for _ in range(PLACES)]
            windows = [np.s_[..., y : y + side, x : x + side] for y, x in places]
            window = min(windows, key=lambda place: canvas[place].sum())
            digit = F.interpolate(
                source[which, None], size=(side, side), mode="bilinear", antialias=True
            )[0]
            inked = digit > THRESHOLD
            # Fainter ink, the rim of a stroke, must not blot out what lies below it.
            below = canvas[window]
            canvas[window] = torch.where(inked, digit, torch.maximum(digit, below))
            label[window][inked[0]] = digits.labels[which] + 1
    return Split(normalise(ink), labels)
