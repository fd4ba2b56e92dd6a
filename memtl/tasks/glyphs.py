"""Endless labelled glyphs, drawn from the fonts that matplotlib ships: a source task.

The 62 alphanumerics of every usable font are rendered once; batches are then distorted on the
fly (affine map, wobble, stroke width, blur, contrast, resolution, noise) strongly enough that
handwriting, and the 8x8 resolution of :func:`memtl.tasks.load_digits`, lie inside the range.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from memtl.tasks.digits import normalise
from memtl.tasks.split import Split

CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
"""The 62 characters; a label is a position in this string."""

HELDOUT_FONTS = (
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmss10",
)
"""Two whole families (a Times-like serif, a sans) that training never sees."""

SIZE = 32
"""Height and width of the images of a batch, in pixels."""

_RENDER = 64  # side of a rendered glyph, in pixels: twice SIZE, so that distortions stay smooth
_EM = 52  # font size, in pixels: capitals are then 38 high, and descenders still fit
_BASELINE = 50  # row of the baseline: puts the middle of a capital at the middle of the image
_COARSE = (8, 10, 12)  # low resolutions, in pixels a side; the digits task is 8x8

_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@cache
def _survey() -> tuple[dict[str, Path], dict[str, str]]:
    """Paths of the usable fonts and reasons against the others, both by font name."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise ImportError("the glyphs task needs matplotlib: pip install memtl[demo]") from error

    usable, left_out = {}, {}
    for path in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        font = FT2Font(str(path))
        charmap = font.get_charmap()
        for label, character in enumerate(CLASSES):
            # The charmap alone is not enough: some symbol fonts put arrows or brackets at the
            # code points of letters. The glyph's own name tells what is drawn there.
            wanted = _DIGIT_NAMES[label] if label < 10 else character
            index = charmap.get(ord(character))
            found = font.get_glyph_name(index) if index else None
            if found != wanted:
                drawn = f"draws {found!r} for" if found else "has no glyph for"
                left_out[path.stem] = f"{drawn} {character!r}"
                break
        else:
            usable[path.stem] = path
    return usable, left_out


def training_fonts() -> list[str]:
    """Names of the usable fonts outside :data:`HELDOUT_FONTS`, sorted.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    return [name for name in _survey()[0] if name not in HELDOUT_FONTS]


def fonts_left_out() -> dict[str, str]:
    """Why each font of matplotlib that is not used is not used, by font name.

    A font is usable when, for each of :data:`CLASSES`, its charset has the character and the
    glyph there bears that character's name. Besides symbol fonts this leaves out old-style
    figures, whose 0 and 1 are drawn like a small o and I.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    return dict(_survey()[1])


def render(font: str) -> Tensor:
    """Draw the 62 characters of one font, centred across, on a common baseline.

    Args:
        font: Name of a usable font, as in :func:`training_fonts` or :data:`HELDOUT_FONTS`.

    Returns:
        ``[62, 64, 64]`` uint8, ink 255 on 0, in the order of :data:`CLASSES`.

    Raises:
        ValueError: If ``font`` is not the name of a usable font.
        ImportError: If matplotlib or Pillow is not installed.
    """
    usable, left_out = _survey()
    if font not in usable:
        reason = left_out.get(font, "matplotlib does not ship it")
        raise ValueError(f"font {font!r} is not usable ({reason}); usable are {sorted(usable)}")
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError("the glyphs task needs Pillow: pip install memtl[demo]") from error

    face = ImageFont.truetype(str(usable[font]), _EM)
    sheet = []
    for character in CLASSES:
        image = Image.new("L", (_RENDER, _RENDER))
        left, _, right, _ = face.getbbox(character, anchor="ls")
        origin = ((_RENDER - left - right) / 2, _BASELINE)
        ImageDraw.Draw(image).text(origin, character, font=face, fill=255, anchor="ls")
        sheet.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
    return torch.stack(sheet).view(-1, _RENDER, _RENDER)


def _blend(levels: Sequence[Tensor], at: Tensor) -> Tensor:
    """Interpolate, image by image, in a list of levels.

    ``levels`` are ``[n, 1, h, w]`` each, ``at`` is ``[n]`` in ``0 .. len(levels) - 1``: 0 gives
    the first level, 1.5 the mean of the second and the third.
    """
    stack = torch.stack(tuple(levels))
    below = at.floor().long().clamp(max=len(stack) - 2)
    rows = torch.arange(len(at), device=at.device)
    weight = (at - below).view(-1, 1, 1, 1)
    return torch.lerp(stack[below, rows], stack[below + 1, rows], weight)


def augment(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Distort glyphs, each differently, and bring them to the size of a batch.

    Args:
        ink: ``[n, 1, 64, 64]`` float32, 0 for blank to 1 for full ink.
        generator: Source of all randomness, on the device of ``ink``.

    Returns:
        ``[n, 1, 32, 32]`` float32 ink in 0..1, not normalised.
    """
    n, device = len(ink), ink.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape, device=device).uniform_(low, high, generator=generator)

    # Stroke width: dilation is a running maximum, erosion a running minimum.
    thin = -F.max_pool2d(-ink, 3, stride=1, padding=1)
    thick = F.max_pool2d(ink, 3, stride=1, padding=1)
    thicker = F.max_pool2d(thick, 3, stride=1, padding=1)
    ink = _blend((thin, ink, thick, thicker), uniform(0.3, 3.0))

    # Half of the images will pass through a low resolution, as the digits did. They are made
    # larger: small letters would be unreadable, and the digits span the whole image.
    coarse = uniform(-len(_COARSE), len(_COARSE)).ceil().clamp(min=0)
    enlarge = 0.15 * (coarse > 0)

    # Affine map. grid_sample wants the map from output to input, hence the inverse scales.
    angle, shear = uniform(-0.2, 0.2), uniform(-0.25, 0.25)
    inverse_x = torch.exp(-uniform(-0.2, 0.15) - enlarge)
    inverse_y = torch.exp(-uniform(-0.1, 0.25) - enlarge)
    cos, sin = angle.cos(), angle.sin()
    rows = (
        (inverse_x * (cos + shear * sin), inverse_x * (shear * cos - sin), uniform(-0.1, 0.1)),
        (inverse_y * sin, inverse_y * cos, uniform(-0.1, 0.1)),
    )
    matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(matrix, list(ink.shape), align_corners=False)
    # A smooth random displacement on top: the wobble of a hand.
    wobble = torch.randn(n, 2, 4, 4, device=device, generator=generator) * uniform(0, 0.08, 1, 1, 1)
    wobble = F.interpolate(wobble, size=ink.shape[-2:], mode="bicubic")
    ink = F.grid_sample(ink, grid + wobble.permute(0, 2, 3, 1), align_corners=False)
    ink = F.avg_pool2d(ink, _RENDER // SIZE)

    ink = _blend((ink, F.avg_pool2d(ink, 3, stride=1, padding=1)), uniform(0, 1))
    resized = [
        F.interpolate(F.adaptive_avg_pool2d(ink, side), size=(SIZE, SIZE), mode="bilinear")
        for side in _COARSE
    ]
    ink = _blend((ink, *resized), coarse)

    gamma, contrast = torch.exp(uniform(-0.7, 0.2, 1, 1, 1)), uniform(0.7, 1.3, 1, 1, 1)
    noise = torch.randn(ink.shape, device=device, generator=generator)
    ink = ink.clamp(0, 1) ** gamma * contrast + noise * uniform(0, 0.1, 1, 1, 1)
    return ink.clamp(0, 1)


def distorted(
    fonts: Sequence[str], classes: Sequence[int], copies: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Every one of some fonts and classes as often, distorted by a generator of that seed.

    Returns:
        ``[copies fonts classes, 1, 32, 32]`` float32 ink in 0..1, and labels.
    """
    labels = torch.tensor(classes)
    sheets = torch.stack([render(font)[labels] for font in fonts])
    ink = sheets.view(-1, 1, _RENDER, _RENDER).repeat(copies, 1, 1, 1).float() / 255
    return augment(ink, torch.Generator().manual_seed(seed)), labels.repeat(copies * len(fonts))


class Glyphs:
    """Batches of distorted glyphs from training fonts, and fixed ones from held-out fonts.

    Args:
        fonts: Names of the fonts of :meth:`batch`; default :func:`training_fonts`.
        normalised: False leaves the ink in 0..1, for a model that normalises it
            (:class:`memtl.models.Normalized`).

    Raises:
        ValueError: If ``fonts`` is empty, or names a font that is not usable.
        ImportError: If matplotlib or Pillow is not installed.
    """

    num_classes = len(CLASSES)

    def __init__(self, fonts: Sequence[str] | None = None, *, normalised: bool = True) -> None:
        self.fonts = tuple(training_fonts() if fonts is None else fonts)
        if not self.fonts:
            raise ValueError("fonts must name at least one font, got none")
        self.normalised = normalised
        self._sheets = torch.stack([render(font) for font in self.fonts])

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` glyphs of uniformly random font and class.

        Args:
            n: Number of images.
            generator: CPU generator; its state alone decides the batch.

        Returns:
            Images ``[n, 1, 32, 32]`` float32 and labels ``[n]`` int64.

        Raises:
            TypeError: If ``n`` is not an int, or ``generator`` not a ``torch.Generator``.
            ValueError: If ``n`` is less than 1.
        """
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"n must be an int, got {type(n).__name__}")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        fonts = torch.randint(len(self.fonts), (n,), generator=generator)
        labels = torch.randint(self.num_classes, (n,), generator=generator)
        ink = self._sheets[fonts, labels].unsqueeze(1).float() / 255
        return self._finish(augment(ink, generator)), labels

    def _finish(self, ink: Tensor) -> Tensor:
        return normalise(ink) if self.normalised else ink

    @cached_property
    def heldout(self) -> Split:
        """2480 distorted images of :data:`HELDOUT_FONTS`: 8 of each font and class.

        The distortions are those of :meth:`batch`, with a fixed seed.
        """
        ink, labels = distorted(HELDOUT_FONTS, range(self.num_classes), copies=8, seed=0)
        return Split(self._finish(ink), labels)
