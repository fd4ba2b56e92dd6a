"""A folder of images: a subfolder for each class, perhaps in folders for each split."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .found import Found, Part
from .shipped import NAMES
from .transform import to_eight_bits

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {
    ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Name of a folder -> the split it is."""
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Files:
    """Images on disk, decoded one at a time."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Image:
        """Raises ValueError, which names the file, where it is no image or is cut short."""
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                image.load()
                return to_eight_bits(image)
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error


def read(name: str, root: Path | None) -> Found:
    """The images of a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are images outside the classes' folders, or none in one; the splits have
            other classes; or there is no train/ beside a val/ or test/.
        ImportError: Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("folders of images need Pillow: pip install memtl[data]") from error
    top = Path(root or "", name)
    if not top.is_dir():
        beside = [p.name for p in _folders(top.parent)] if top.parent.is_dir() else []
        near = difflib.get_close_matches(top.name, [*beside, *NAMES], 1)
        hint = f"; do you mean {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"there is no folder {top}, and no data of that name: there is {', '.join(NAMES)}, "
            f"torchvision:NAME, datasets:NAME{hint}"
        )
    inside = _folders(top)
    splits = {path: SPLITS[path.name.lower()] for path in inside if path.name.lower() in SPLITS}
    if "train" not in splits.values():  # a class may be called "test"
        splits = {path: split for path, split in splits.items() if _folders(path)}
    if not splits:
        classes, part = _classes(top)
        return Found(str(top), {"train": part}, classes)
    if other := [path.name for path in inside if path not in splits]:
        raise ValueError(
            f"{top} has splits ({', '.join(p.name for p in splits)}) and beside them "
            f"{_few(other)}: what are these?"
        )
    _check_loose(top)
    if "train" not in splits.values():
        raise ValueError(f"{top} has {', '.join(p.name for p in splits)}, but no train")
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{top} has a split twice: {', '.join(p.name for p in splits)}")
    found = {split: (path, *_classes(path)) for path, split in splits.items()}
    _, classes, _ = found["train"]
    for path, others, _ in found.values():
        for what, names in (
            ("has", sorted({*others} - {*classes})),
            ("lacks", sorted({*classes} - {*others})),
        ):
            if names:
                raise ValueError(
                    f"{path} {what} {_few(names)}, but the classes of train are {_few(classes)}"
                )
    order = [split for split in ("train", "val", "test") if split in found]
    return Found(str(top), {split: found[split][2] for split in order}, classes)


def _classes(folder: Path) -> tuple[tuple[str, ...], Part]:
    """The names of the subfolders, and the images in them, however deep."""
    _check_loose(folder)
    inside = _folders(folder)
    if not inside:
        raise ValueError(f"{folder} has no subfolders: there must be one of images for each class")
    paths: list[Path] = []
    labels: list[int] = []
    for label, subfolder in enumerate(inside):
        images = images_in(subfolder)
        if not images:
            raise ValueError(f"{subfolder} has no images ({', '.join(sorted(SUFFIXES))})")
        paths += images
        labels += [label] * len(images)
    return tuple(path.name for path in inside), Part(Files(tuple(paths)), labels)


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder, however deep, sorted."""
    return sorted(
        Path(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if _is_image(name)
    )


def _folders(folder: Path) -> list[Path]:
    """Subfolders, sorted, but for hidden ones and those that archives of macOS have."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._@")


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _check_loose(folder: Path) -> None:
    if loose := sorted(p.name for p in folder.iterdir() if p.is_file() and _is_image(p.name)):
        raise ValueError(
            f"{folder} has images outside its classes' folders ({_few(loose)}): of what class? "
            "There must be a subfolder for each"
        )


def _few(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
