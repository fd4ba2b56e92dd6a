"""Classification data sets of torchvision, by their classes' names there."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .found import Found, Part

ROOT = Path("data")
FOLDERS = ("DatasetFolder", "ImageFolder", "VisionDataset")
SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid", "validation"), "test": ("test",)}
"""A part -> what torchvision's data sets call it."""
LABELS = ("targets", "labels", "_labels", "y")
"""Attributes in which they have their labels."""
PAIRS = ("samples", "_samples", "imgs")
"""Attributes in which they have pairs that end in a label."""
NAMES = ("classes", "categories")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The images of one."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int, /) -> Any:
        return self.dataset[index][0]


def read(name: str, root: Path | None, download: bool = False) -> Found:
    """The data set of that name in ``root``.

    Raises:
        ValueError: torchvision has none of that name, or none that is for classification.
        FileNotFoundError: it is not in ``root``, or not whole.
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"torchvision:{name} needs torchvision: pip install memtl[data]"
        ) from error
    kinds: dict[str, Any] = {
        n: k for n in datasets.__all__ if inspect.isclass(k := getattr(datasets, n))
    }
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 3)
        hint = f": do you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"torchvision has no data set {name!r}{hint}")
    kind, where = kinds[name], ROOT if root is None else root
    known = inspect.signature(kind).parameters
    if "root" not in known or name in FOLDERS:
        raise ValueError(f"torchvision:{name} is no data set by itself: give a folder by its path")
    options: dict[str, Any] = {"download": download} if "download" in known else {}
    if download and not options:
        raise ValueError(f"torchvision cannot download {name}: put it into {where}")
    origin = f"torchvision:{name}"
    with _explained(origin, where, download), _quiet():
        if "train" in known:
            wholes = {p: kind(where, train=p == "train", **options) for p in ("train", "test")}
        elif "split" in known:
            wholes = _splits(kind, where, options, origin)
        else:
            wholes = {"train": kind(where, **options)}
    labels = {part: _labels(whole, origin) for part, whole in wholes.items()}
    parts = {part: Part(Pictures(whole), labels[part]) for part, whole in wholes.items()}
    return Found(origin, parts, _names(wholes["train"], labels))


def _splits(kind: Any, where: Path, options: dict[str, Any], origin: str) -> dict[str, Any]:
    """The parts that this data set has under one of the names that there are for them."""
    found: dict[str, Any] = {}
    refusal: Exception | None = None
    for part, names in SPLITS.items():
        for name in names:
            try:
                found[part] = kind(where, split=name, **options)
                break
            except ValueError as error:  # it does not know that name
                refusal = error
    if "train" not in found:
        raise ValueError(f"{origin} has no split {' or '.join(SPLITS['train'])}: {refusal}")
    return found


def _labels(dataset: Any, origin: str) -> list[int]:
    """Of every sample, without decoding its image where that can be had."""
    whole: Any = next((v for n in LABELS if (v := getattr(dataset, n, None)) is not None), None)
    if whole is None:
        pairs = next((v for n in PAIRS if (v := getattr(dataset, n, None))), None)
        whole = [p[-1] for p in pairs] if pairs else [dataset[i][1] for i in range(len(dataset))]
    labels: list[Any] = torch.as_tensor(whole).tolist() if len(whole) == len(dataset) else [None]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"{origin} has no class for each image: it is not for classification")
    return labels


def _names(dataset: Any, labels: dict[str, list[int]]) -> tuple[str, ...]:
    """Of the classes; numbers where there are no names."""
    count = 1 + max(max(of_part, default=0) for of_part in labels.values())
    names = next((v for n in NAMES if (v := getattr(dataset, n, None))), ())
    return tuple(map(str, names if len(names) >= count else range(count)))


@contextlib.contextmanager
def _explained(origin: str, where: Path, download: bool) -> Iterator[None]:
    """Says what to do where files are missing: torchvision raises RuntimeError for that."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if download:
            raise OSError(f"{origin} cannot be fetched to {where}: {error}") from error
        raise FileNotFoundError(
            f"{origin} is not in {where}, or not whole: put it there, or ask for download=true "
            f"({error})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torchvision's prints; without its bars where nobody watches them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
