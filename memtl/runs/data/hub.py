"""Data sets of Hugging Face's library ``datasets``: by name, or from a folder or file."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...tasks.text import datasets_library
from .found import Found, Part

SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "dev": "val"} | {
    "test": "test"
}
"""What splits are called there -> the part it is; others are left out."""
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
LABELS = ("label", "labels", "class", "target", "category", "y")
TEXTS = ("text", "sentence")
"""What columns are called by which one is told from others of its kind."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """One column, or two as a pair, of a table that stays on disk."""

    rows: Any
    columns: tuple[str, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Any:
        try:
            row = self.rows[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"row {index} of {self.origin} cannot be read: {error}") from error
        values = tuple(row[column] for column in self.columns)
        if any(value is None for value in values):
            raise ValueError(f"row {index} of {self.origin} has nothing in {self.columns}")
        return values if len(values) > 1 else values[0]


def read(
    name: str,
    root: Path | None,
    *,
    kind: str | None = None,
    config: str | None = None,
    image: str | None = None,
    text: str | None = None,
    label: str | None = None,
) -> Found:
    """The data set of that name on the hub or in its cache, or of that folder or file.

    Args:
        kind: "image" or "text", what the network takes; None for what there is.
        config: which of several data sets of that name.
        image, text, label: columns; None where types and names tell. ``text`` may be two.

    Raises:
        ValueError: columns or splits are not to be told, or labels are none.
        OSError: there is no such data set.
        ImportError: ``datasets`` is not installed.
    """
    origin = f"datasets:{name}"
    library = datasets_library()
    with _quiet(library):
        whole = _load(library, name, root, config, origin)
    splits: dict[str, Any] = {}
    for own, rows in whole.items():
        if part := SPLITS.get(own) or ("train" if len(whole) == 1 else None):
            if part in splits:
                raise ValueError(f"{origin} has several splits for {part}: {', '.join(whole)}")
            splits[part] = rows
    if "train" not in splits:
        raise ValueError(f"{origin} has no split 'train', but {', '.join(whole)}")
    features = splits["train"].features
    answer = _column(features, label, _labels_among(library, features), "label", LABELS, origin)
    pictures = [n for n, f in features.items() if isinstance(f, library.Image)]
    if kind is None:
        kind = "image" if image or (pictures and not text) else "text"
    if (text if kind == "image" else image) is not None:
        raise ValueError(f"the network takes {kind}s: {origin} must have a column of those")
    columns: tuple[str, ...]
    if kind == "image":
        columns = (_column(features, image, pictures, "image", (), origin),)
        if columns[0] not in pictures:
            raise ValueError(f"{origin}: {columns[0]} is a column of {features[columns[0]]}")
    else:
        strings = [n for n, f in features.items() if _is_string(f) and n != answer]
        asked = text.split(",") if text else [None]
        if len(asked) > 2:
            raise ValueError(f"text must be one column or two, got {text}")
        columns = tuple(_column(features, n, strings, "text", TEXTS, origin) for n in asked)
        if wrong := [n for n in columns if n not in strings]:
            raise ValueError(f"{origin}: {wrong[0]} is a column of {features[wrong[0]]}, not text")
    classes, labels = _classes(library, splits, answer, origin)
    parts = {
        part: Part(Rows(rows.select_columns(list(columns)), columns, f"{origin} ({part})"), found)
        for part, rows in splits.items()
        if (found := labels[part]) is not None
    }
    order = [part for part in ("train", "val", "test") if part in parts]
    return Found(origin, {part: parts[part] for part in order}, classes, kind)


def _load(library: Any, name: str, root: Path | None, config: str | None, origin: str) -> Any:
    path = Path(root or "", name)
    try:
        if path.is_dir() and any((path / f).is_file() for f in ("dataset_dict.json", "state.json")):
            found = library.load_from_disk(str(path))
        elif path.is_dir():
            found = library.load_dataset(str(path), config)
        elif path.is_file():
            if path.suffix not in BUILDERS:
                raise ValueError(f"{path} is none of {', '.join(BUILDERS)}")
            found = library.load_dataset(BUILDERS[path.suffix], data_files=str(path))
        else:
            cache = None if root is None else str(root)
            found = library.load_dataset(name, config, cache_dir=cache)
    except (OSError, library.exceptions.DatasetGenerationError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        raise OSError(f"{origin} cannot be had: {said}") from error
    return found if isinstance(found, dict) else {"train": found}


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _labels_among(library: Any, features: Any) -> list[str]:
    """Columns of classes; where none says so, those that are called like labels."""
    found = [n for n, f in features.items() if isinstance(f, library.ClassLabel)]
    return found or [n for n in features if n.lower() in LABELS]


def _column(
    features: Any, asked: str | None, found: list[str], what: str, usual: Sequence[str], origin: str
) -> str:
    """The column that was asked for; else the only one there is, or the only usual one."""
    if asked is not None:
        if asked not in features:
            raise ValueError(f"{origin} has no column {asked!r}, but {', '.join(features)}")
        return asked
    if len(found) > 1:
        found = [name for name in usual if name in found][:1] or found
    if len(found) == 1:
        return found[0]
    which = f"several could be the {what}: {', '.join(found)}" if found else f"none is the {what}"
    raise ValueError(f"{origin}: of the columns {', '.join(features)} {which}: say {what}=COLUMN")


def _classes(
    library: Any, splits: dict[str, Any], column: str, origin: str
) -> tuple[tuple[str, ...], dict[str, list[int] | None]]:
    """The names of the classes, and by part the labels; None for a test set without any."""
    feature = splits["train"].features[column]
    raw = {part: list(rows[column]) for part, rows in splits.items()}
    if isinstance(feature, library.ClassLabel):
        names: list[Any] = list(range(len(feature.names)))
        classes = tuple(feature.names)
    else:
        given = {v for v in raw["train"] if v is not None}
        if wrong := [v for v in given if not isinstance(v, (bool, int, str))]:
            raise ValueError(f"{origin}: {column} has {wrong[0]!r}, which is no class")
        names = sorted(given)
        classes = tuple(map(str, names))
    place = {value: index for index, value in enumerate(names)}
    labels: dict[str, list[int] | None] = {}
    for part, values in raw.items():
        if part == "test" and all(v is None or v == -1 for v in values):
            labels[part] = None  # as competitions have it
            continue
        if wrong := [i for i, v in enumerate(values) if v not in place]:
            raise ValueError(
                f"{origin}: {len(wrong)} rows of {part} have a {column} that train does not have, "
                f"the first in row {wrong[0]}: {values[wrong[0]]!r}"
            )
        labels[part] = [place[value] for value in values]
    return classes, labels


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without bars where nobody watches them."""
    hide = not sys.stderr.isatty() and not library.are_progress_bars_disabled()
    if hide:
        library.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            library.enable_progress_bars()
