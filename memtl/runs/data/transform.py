"""From an image to what a network takes, as in evaluation or at random."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..networks import Wants

if TYPE_CHECKING:
    from PIL.Image import Image

RATIOS = (3 / 4, 4 / 3)
"""Width to height of what is cut out at random."""
TRIES = 10
"""Of sizes that may not fit into the image."""

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A square of an image, resized and normalised.

    In evaluation it is the middle, of ``wants.crop`` of the shorter side; in training a rectangle
    at random (Szegedy et al., CVPR 2015), perhaps mirrored.

    Args:
        wants: what the network takes.
        min_scale: the least share of the image's area that is cut out at random, in (0, 1].
        flip: how likely it is mirrored, in [0, 1].

    Raises:
        TypeError, ValueError: a number is none of these.
    """

    wants: Wants
    min_scale: float = 0.5
    flip: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("min_scale", self.min_scale), ("flip", self.flip)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must be in (0, 1], got {self.min_scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be in [0, 1], got {self.flip}")

    def __call__(self, image: Image, seed: int | None) -> Tensor:
        """``[channels, size, size]`` float32."""
        from PIL.Image import Resampling, Transpose

        wants = self.wants
        image = to_eight_bits(image).convert("L" if wants.channels == 1 else "RGB")
        box, mirrored = middle(*image.size, wants.crop), False
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            box = at_random(*image.size, self.min_scale, generator)
            mirrored = torch.rand((), generator=generator).item() < self.flip
        how = Resampling[wants.interpolation.upper()]
        image = image.resize((wants.size, wants.size), how, box)
        if mirrored:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).view(wants.size, wants.size, -1)
        pixels = pixels.permute(2, 0, 1).contiguous()
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (wants.mean, wants.std))
        return (pixels.float() / 255 - mean) / std


def middle(width: int, height: int, crop: float) -> Box:
    """The square in the middle whose side is ``crop`` of the image's shorter side."""
    side = max(1, round(crop * min(width, height)))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def at_random(width: int, height: int, min_scale: float, generator: torch.Generator) -> Box:
    """A rectangle of ``min_scale`` of the area or more; the middle if none is found that fits."""
    lowest, highest = map(math.log, RATIOS)
    for _ in range(TRIES):
        share, shape, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (min_scale + (1 - min_scale) * share)
        ratio = math.exp(lowest + (highest - lowest) * shape)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    return middle(width, height, 1.0)


def to_eight_bits(image: Image) -> Image:
    """The image as a viewer shows it: upright, of 8 bits a channel, over white where it is
    transparent.

    Raises:
        ValueError: its pixels are floats, of which nothing says what is white.
    """
    from PIL import Image as images
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floats (mode F): convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
        return images.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        over = image.convert("RGBA")
        return images.alpha_composite(images.new("RGBA", over.size, "white"), over)
    return image
