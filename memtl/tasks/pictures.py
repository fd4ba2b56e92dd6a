"""CIFAR-10, CIFAR-100 and SVHN from a local folder, through torchvision: nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memtl.tasks.digits import Task
from memtl.tasks.split import Split
from memtl.tasks.vtab import NORMALISATIONS

DATASETS = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100), "svhn": ("SVHN", 10)}
"""Name -> torchvision's class and the number of classes."""

VALIDATION = 5000
"""The last images of a training set, which are kept for choices."""

IMAGENET_MEAN, IMAGENET_STD = NORMALISATIONS["imagenet"]
"""Of the channels, for :class:`memtl.models.Normalized` around what was pre-trained on ImageNet."""


class Pixels:
    """Images in bytes as the batches of a tensor: converted, and resized, when they are asked for.

    Args:
        pixels: ``[n, channels, height, width]`` uint8.
        size: Height and width of the images of a batch, which are resized bilinearly, with
            antialiasing where that shrinks them.

    Raises:
        ValueError: If ``size`` is less than 1.

    Memory: one byte a number; a batch is made anew each time.
    """

    def __init__(self, pixels: Tensor, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.pixels = pixels
        self.size = size

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """``[n, channels, size, size]`` float32 in 0..1, of a slice or of n int64 positions."""
        if not isinstance(index, slice) and not (
            isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1
        ):
            raise TypeError(f"images are indexed by a slice or a 1-d int64 tensor, not by {index}")
        images = self.pixels[index].float().div_(255)
        if images.shape[-2:] == (self.size, self.size):
            return images
        size = (self.size, self.size)
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return images.clamp_(0, 1)  # which rounding may leave

    def split(self, batch_size: int, /) -> Iterator[Tensor]:
        """All of them in order, ``batch_size`` at a time, the last batch with what is left."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]


def load_pictures(root: str | PathLike[str], dataset: str, *, size: int = 32) -> Task:
    """Return CIFAR-10, CIFAR-100 or SVHN; the last 5000 training images are the validation split.

    The images are in 0..1: a network that was pre-trained on others is put behind their mean and
    deviation (:class:`memtl.models.Normalized`, :data:`IMAGENET_MEAN`, :data:`IMAGENET_STD`).

    Args:
        root: The folder with what the archives unpack to, ``cifar-10-batches-py/`` or
            ``cifar-100-python/``, or with ``train_32x32.mat`` and ``test_32x32.mat``.
        dataset: One of :data:`DATASETS`.
        size: Height and width of the images, in pixels; they are 32 on disk.

    Raises:
        ValueError: If ``dataset`` is unknown, ``size`` is less than 1, or a file is not the one
            that was published.
        FileNotFoundError: If a file is missing; the message says what belongs where.
        ImportError: If torchvision, or for SVHN scipy, is not installed.

    Memory: 3 KiB an image, 176 MiB for CIFAR, 284 MiB for SVHN, twice that of the training set
        while it is read; batches are made when they are asked for.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    try:
        import torchvision.datasets

        if dataset == "svhn":
            import scipy.io  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{dataset} needs torchvision and scipy: pip install memtl[demo]"
        ) from error
    name, classes = DATASETS[dataset]
    kind = getattr(torchvision.datasets, name)
    try:
        learn, report = (_read(kind, root, part) for part in ("train", "test"))
    except RuntimeError:  # which does not say what is wrong
        _explain(kind, Path(root), dataset)
        raise
    train, val, test = (
        Split(Pixels(pixels[part], size), labels[part])
        for (pixels, labels), part in (
            (learn, np.s_[:-VALIDATION]),
            (learn, np.s_[-VALIDATION:]),
            (report, np.s_[:]),
        )
    )
    return Task(dataset, classes, train, val, test)


def _read(kind: Any, root: str | PathLike[str], part: str) -> tuple[Tensor, Tensor]:
    """``[n, 3, 32, 32]`` uint8, an image after the other in memory, and labels."""
    if hasattr(kind, "split_list"):
        data = kind(root, split=part)
        pixels, labels = data.data, data.labels
    else:
        data = kind(root, train=part == "train")
        pixels, labels = data.data.transpose(0, 3, 1, 2), data.targets
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.as_tensor(labels)


def _explain(kind: Any, root: Path, dataset: str) -> None:
    """Raise what says which file is missing or damaged, if one is."""
    from torchvision.datasets.utils import check_integrity

    if hasattr(kind, "split_list"):
        wanted = [kind.split_list[part] for part in ("train", "test")]
        origin = " and ".join(url for url, _, _ in wanted)
        files = {root / name: md5 for _, name, md5 in wanted}
    else:
        folder, meta = root / kind.base_folder, kind.meta
        listed = [*kind.train_list, *kind.test_list, (meta["filename"], meta["md5"])]
        origin = f"{folder.name} as {kind.url} unpacks to"
        files = {folder / name: md5 for name, md5 in listed}
    if missing := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"{dataset} belongs in {root}: {origin}; there is no {_listed(missing)}"
        )
    if damaged := [path for path, md5 in files.items() if not check_integrity(path, md5)]:
        raise ValueError(
            f"{_listed(damaged)} is not what was published (another md5): put {origin} in {root}"
        )


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))
