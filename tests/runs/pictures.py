"""Folders of small images, of which each says which one it is."""

from pathlib import Path

import numpy as np
from PIL import Image


def image(number: int) -> Image.Image:
    """Of one colour, which is the number."""
    return Image.fromarray(np.full((6, 7, 3), number, np.uint8))


def number_of(tensor) -> int:
    """Of an image whose network takes pixels in 0..1 as they are."""
    return round(255 * tensor.mean().item())


def write(root: Path, counts: dict[str, int], first: int = 0) -> None:
    """``counts``: folder -> how many; images are numbered throughout."""
    number = first
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            image(number).save(root / folder / f"{number:03}.png")
            number += 1
