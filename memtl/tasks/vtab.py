"""VTAB-1k: nineteen tasks of 1000 training images each, in the folder layout that people share.

``ROOT/<dataset>/`` holds the images and four lists of them, ``train800.txt``, ``val200.txt``,
``train800val200.txt`` (the two together) and ``test.txt``; a line is a path, relative to the
dataset's folder, a blank, and a label. The digits come in the same shape, without any folder.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memtl.files import sha256_of
from memtl.tasks import digits
from memtl.tasks.split import Split

GROUPS = ("natural", "specialized", "structured")

DATASETS = {
    "cifar": ("natural", 100),
    "caltech101": ("natural", 102),
    "dtd": ("natural", 47),
    "oxford_flowers102": ("natural", 102),
    "oxford_iiit_pet": ("natural", 37),
    "svhn": ("natural", 10),
    "sun397": ("natural", 397),
    "patch_camelyon": ("specialized", 2),
    "eurosat": ("specialized", 10),
    "resisc45": ("specialized", 45),
    "diabetic_retinopathy": ("specialized", 5),
    "clevr_count": ("structured", 8),
    "clevr_dist": ("structured", 6),
    "dmlab": ("structured", 6),
    "kitti": ("structured", 4),
    "dsprites_loc": ("structured", 16),
    "dsprites_ori": ("structured", 16),
    "smallnorb_azi": ("structured", 18),
    "smallnorb_ele": ("structured", 9),
}
"""The nineteen: the folder's name -> its group and its number of classes."""

OTHER = "other"
"""The group of a dataset that is none of the nineteen."""

NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation by name, for images in 0..1."""

LISTS = ("train800", "val200", "train800val200", "test")

CACHE_BYTES = 2**28
"""Decoded training images that a task may hold: 1000 of 224 x 224 are 144 MiB."""


class ImageFiles:
    """Images on disk as the batches of a tensor: read when they are asked for.

    Each is converted to RGB and resized whole, without a crop, to ``size`` x ``size``, by Pillow's
    bilinear filter, which smooths where it shrinks.

    Args:
        paths: The files, in order.
        size: Height and width of the images, in pixels.
        normalise: One of :data:`NORMALISATIONS`. A pre-trained network expects the one it was
            trained with: "imagenet" for most, "half" for timm's augreg ViTs, and published VTAB
            figures differ by it.
        cache: Where decoded images are kept, by path, until they are :data:`CACHE_BYTES` in all;
            several splits may share it. None keeps nothing.

    Raises:
        ValueError: If ``size`` is less than 1 or ``normalise`` is unknown; when a batch is asked
            for, if a file cannot be read as an image.
        ImportError: If Pillow is not installed.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int,
        normalise: str,
        cache: dict[Path, Tensor] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        if normalise not in NORMALISATIONS:
            raise ValueError(f"normalise must be one of {[*NORMALISATIONS]}, got {normalise!r}")
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError("image files need Pillow: pip install memtl[demo]") from error
        self.paths = tuple(paths)
        self.size = size
        self._mean, self._std = (
            torch.tensor(values).view(3, 1, 1) for values in NORMALISATIONS[normalise]
        )
        self._cache = cache

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """``[n, 3, size, size]`` float32 for a slice, or for an int64 tensor of n positions."""
        if isinstance(index, slice):
            chosen: Sequence[Path] = self.paths[index]
        elif isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1:
            chosen = [self.paths[i] for i in index.tolist()]
        else:
            raise TypeError(f"images are indexed by a slice or a 1-d int64 tensor, not by {index}")
        if not chosen:
            return torch.empty(0, 3, self.size, self.size)
        with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
            pixels = torch.stack(list(pool.map(self._pixels, chosen)))
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def split(self, batch_size: int, /) -> Iterator[Tensor]:
        """All of them in order, ``batch_size`` at a time, the last batch with what is left."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    def _pixels(self, path: Path) -> Tensor:
        """``[3, size, size]`` uint8."""
        from PIL import Image

        if self._cache is not None and path in self._cache:
            return self._cache[path]
        try:
            with Image.open(path) as image:
                resized = image.convert("RGB").resize(
                    (self.size, self.size), Image.Resampling.BILINEAR
                )
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
        if self._cache is not None and (len(self._cache) + 1) * pixels.numel() <= CACHE_BYTES:
            self._cache[path] = pixels
        return pixels


@dataclass(frozen=True)
class VtabTask:
    """A classification task in the splits of VTAB-1k.

    Attributes:
        name: The dataset's name, that of its folder.
        group: One of :data:`GROUPS`, or :data:`OTHER`.
        num_classes: Number of labels.
        data: What tells these images and splits from others of that name: of a folder, the lists,
            the size in bytes of every image, and the content of those to learn from.
        train: 800 images to learn from while hyper-parameters are chosen.
        val: 200 images to choose them on.
        trainval: Both, to learn from once they are chosen.
        test: Images to report on, once.
    """

    name: str
    group: str
    num_classes: int
    data: str
    train: Split
    val: Split
    trainval: Split
    test: Split


def load_vtab(
    root: str | PathLike[str], dataset: str, *, normalise: str, size: int = 224
) -> VtabTask:
    """Return one dataset of a folder in the shared layout; no image is decoded yet.

    The number of classes is that of :data:`DATASETS`; of a dataset not listed there, the largest
    label of its lists and one more. The training images are kept once they are decoded.

    Args:
        root: The folder of the datasets' folders.
        dataset: The name of one of them.
        normalise: As for :class:`ImageFiles`, which says why there is no default.
        size: Height and width of the images, in pixels.

    Raises:
        FileNotFoundError: If the folder, a list or a listed image is not there.
        ValueError: If a line is malformed, a label out of range, a list empty, or if the lists
            contradict each other: an image in both ``train800`` and ``val200``, or those two
            together not the same as ``train800val200``. And as for :class:`ImageFiles`.
    """
    folder = Path(root, dataset)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    group, count = DATASETS.get(dataset, (OTHER, None))
    digest = hashlib.sha256(f"{size} {normalise}".encode())
    cache: dict[Path, Tensor] = {}
    listed, splits = {}, {}
    for name in LISTS:
        listed[name] = _read(folder / f"{name}.txt", count, digest)
        splits[name] = Split(
            ImageFiles(
                [folder / path for path, _ in listed[name]],
                size,
                normalise,
                None if name == "test" else cache,
            ),
            torch.tensor([label for _, label in listed[name]]),
        )
    _check_union(folder, *(listed[name] for name in LISTS[:3]))
    with ThreadPoolExecutor() as pool:
        for content in pool.map(sha256_of, [folder / p for p, _ in listed["train800val200"]]):
            digest.update(content.encode())
    return VtabTask(
        dataset,
        group,
        count or 1 + max(int(split.labels.max()) for split in splits.values()),
        digest.hexdigest(),
        *splits.values(),
    )


def datasets(root: str | PathLike[str]) -> list[str]:
    """Names of the folders in ``root`` that have a list: the nineteen in order, then others.

    Raises:
        FileNotFoundError: If ``root`` is not there.
        ValueError: If no folder in it has one.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = {path.parent.name for name in LISTS for path in Path(root).glob(f"*/{name}.txt")}
    if not found:
        raise ValueError(f"no folder in {root} has a list of images ({LISTS[0]}.txt, ...)")
    return [name for name in DATASETS if name in found] + sorted(found - DATASETS.keys())


def _read(path: Path, classes: int | None, digest: hashlib._Hash) -> list[tuple[str, int]]:
    """The paths and labels of a list, which ``digest`` is shown, with the sizes of the files."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}")
    content = path.read_bytes()
    digest.update(b"%d " % len(content) + content)
    entries = []
    for number, line in enumerate(content.decode(errors="surrogateescape").split("\n"), 1):
        if not line.strip():
            continue
        image, _, label = line.strip().rpartition(" ")
        place = f"{path}:{number}"
        if not image or not label.isdecimal():
            raise ValueError(f"{place}: a line is a path, a blank and a label, not {line!r}")
        if classes is not None and int(label) >= classes:
            raise ValueError(
                f"{place}: label {label} is out of range: {path.parent.name} has {classes} classes"
            )
        image = image.rstrip()
        file = path.parent / image
        if not file.is_file():
            raise FileNotFoundError(f"{place}: there is no image {file}")
        digest.update(b"%d " % file.stat().st_size)
        entries.append((image, int(label)))
    if not entries:
        raise ValueError(f"{path} lists no image")
    return entries


def _check_union(folder: Path, train: list, val: list, trainval: list) -> None:
    if both := {path for path, _ in train} & {path for path, _ in val}:
        raise ValueError(f"{folder}: {min(both)} is in train800.txt and in val200.txt")
    parts, whole = Counter(train + val), Counter(trainval)
    if different := (parts - whole) + (whole - parts):
        path, label = min(different)
        raise ValueError(
            f"{folder}: train800val200.txt is not train800.txt and val200.txt together: "
            f"{path} {label} is in one alone"
        )


def load_digits_vtab(size: int = 32) -> VtabTask:
    """Return scikit-learn's handwritten digits in the same shape: 800 / 200 / 797 for the test.

    Images and errors are those of :func:`load_digits`, the split is stratified and always the same.
    """
    images, labels = digits.source(size)
    train, val, test = digits.stratified(labels, (800, 200, 797))
    parts = (train, val, [*train, *val], test)
    return VtabTask(
        "digits", OTHER, 10, f"digits {size}", *(Split(images[i], labels[i]) for i in parts)
    )
