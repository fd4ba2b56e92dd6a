"""What a classifier of digits has never seen, and should not be sure about: letters, and noise.

Both come in the shape of :func:`memtl.tasks.load_digits` and need no download. Their labels are
none of the digits' classes, so that a score that needs labels refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from memtl.tasks.digits import MEAN, STD, normalise
from memtl.tasks.glyphs import CLASSES, HELDOUT_FONTS, SIZE, distorted
from memtl.tasks.split import Split

LOOKALIKES = "DOQoIijlZzSsGbBgq"
"""Letters that are left out, for distorted they can be read as 0, 1, 2, 5, 6, 8 or 9: a classifier
that is sure of its digit there is not wrong."""

LETTERS = "".join(c for c in CLASSES if c.isalpha() and c not in LOOKALIKES)
"""The letters of :func:`letters`."""

KINDS = ("uniform", "normal")


def letters(
    fonts: str | Sequence[str] = HELDOUT_FONTS,
    *,
    size: int = SIZE,
    copies: int = 8,
    seed: int = 0,
    normalised: bool = True,
) -> Split:
    """Return :data:`LETTERS` in some fonts, distorted as :class:`memtl.tasks.Glyphs` distorts.

    The default are the fonts that the shipped networks have not seen.

    Args:
        fonts: A name, or names, of usable fonts (:func:`memtl.tasks.glyphs.training_fonts`,
            :data:`memtl.tasks.glyphs.HELDOUT_FONTS`).
        size: Height and width of the images, in pixels; other than 32 they are resized bilinearly
            with antialiasing.
        copies: Images of each font and letter.
        seed: Of the distortions.
        normalised: False leaves the ink in 0..1.

    Returns:
        ``[fonts letters copies, 1, size, size]`` float32; labels are positions in
        :data:`memtl.tasks.glyphs.CLASSES`, 10 or more.

    Raises:
        TypeError: If ``size``, ``copies`` or ``seed`` is not an int.
        ValueError: If there is no font, one is not usable, or ``size`` or ``copies`` is less
            than 1.
        ImportError: If matplotlib or Pillow is not installed.
    """
    _check(seed=seed)
    _check(1, size=size, copies=copies)
    fonts = (fonts,) if isinstance(fonts, str) else tuple(fonts)
    if not fonts:
        raise ValueError("fonts must name at least one font, got none")
    classes = [CLASSES.index(letter) for letter in LETTERS]
    ink, labels = distorted(fonts, classes, copies, seed)
    if size != SIZE:
        ink = F.interpolate(ink, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
    return Split(normalise(ink) if normalised else ink, labels)


def noise(
    n: int,
    kind: str = "uniform",
    *,
    shape: Sequence[int] = (1, SIZE, SIZE),
    seed: int = 0,
    normalised: bool = True,
) -> Split:
    """Return ``n`` images every number of which is drawn by itself.

    Args:
        n: Number of images.
        kind: ``"uniform"`` in 0..1, or ``"normal"`` with the mean and deviation of the digits' ink,
            cut to 0..1.
        shape: Of an image: channels, height, width.
        seed: Of the draw.
        normalised: False leaves the ink in 0..1.

    Returns:
        ``[n, *shape]`` float32; every label is -1.

    Raises:
        TypeError: If ``n``, ``seed`` or a number in ``shape`` is not an int.
        ValueError: If ``n`` or one of three numbers in ``shape`` is less than 1, or ``kind`` is
            unknown.
    """
    _check(seed=seed)
    _check(1, n=n)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if len(shape) != 3:
        raise ValueError(f"shape must be (channels, height, width), got {(*shape,)}")
    for name, value in zip(("channels", "height", "width"), shape, strict=True):
        _check(1, **{name: value})
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        ink = torch.rand(n, *shape, generator=generator)
    else:
        ink = (torch.randn(n, *shape, generator=generator) * STD + MEAN).clamp(0, 1)
    return Split(normalise(ink) if normalised else ink, torch.full((n,), -1))


def _check(least: int | None = None, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
