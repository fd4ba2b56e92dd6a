"""The folder of a save: a record that names a file of weights. Kills, and other processes that save
there too, leave a whole save."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import sha256_of, write_aside
from . import card

RECORD = "memtl.json"
CARD = "README.md"
VERSION = 1
_WEIGHTS = re.compile(r"weights-[0-9a-f]{12}\.safetensors")
_ASIDE = re.compile(r"\.(memtl\.json|README\.md|weights\.safetensors)\.\d+")


def write(
    directory: Path,
    about: dict[str, Any],
    tensors: Mapping[str, Tensor] | None,
    text: Callable[[int], str],
) -> None:
    """Write weights, if any, then the record that names them, then the model card (``text`` of the
    bytes of the weights) unless there is one by others; delete what they replace."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory) as alone:
        if alone:  # then nobody is writing these
            for path in directory.iterdir():
                if _ASIDE.fullmatch(path.name):
                    path.unlink()
        before = _named(directory)
        record = {"version": VERSION, **about}
        size = 0
        if tensors is not None:
            name = "weights-{:.12}.safetensors"
            digest = write_aside(
                directory / "weights.safetensors",
                lambda path: save_file(dict(tensors), path),
                named=name.format,
            )
            record |= {"weights": name.format(digest), "sha256": digest}
            size = (directory / record["weights"]).stat().st_size
        _write_text(directory / RECORD, json.dumps(record, indent=2) + "\n")  # now it counts
        if card.may_be_written(directory / CARD):
            _write_text(directory / CARD, text(size))
        # Where there are no locks, what a killed save left may be what another is about to name.
        stale = {p.name for p in directory.iterdir()} if alone else {before}
        for old in stale - {record.get("weights"), None}:
            if _WEIGHTS.fullmatch(str(old)):
                (directory / str(old)).unlink(missing_ok=True)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The record, and the weights that it names, if any.

    Raises:
        FileNotFoundError: there is no save, or its weights are missing.
        ValueError: a file is damaged or altered, or of a newer memtl.
    """
    record = _record(directory)
    while "weights" in record:
        try:
            return record, _weights(directory / record["weights"], record["sha256"])
        except FileNotFoundError:
            known, record = record, _record(directory)
            if record == known:  # else it was saved anew meanwhile, and the weights deleted
                raise FileNotFoundError(
                    f"{directory / RECORD} names {record['weights']}, which is missing"
                ) from None
    return record, None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Wait until no other process saves there, and keep it so; a lock ends with its process.
    False where the file system has none."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _named(directory: Path) -> str | None:
    """The weights that the record of ``directory`` names, if it can be read."""
    try:
        return _record(directory).get("weights")
    except (FileNotFoundError, ValueError):
        return None


def _record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} holds no save: it has no {RECORD}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("methods"), list):
        raise ValueError(f'{path} is damaged, or no save of memtl\'s: it has no list "methods"')
    if record.get("version") != VERSION:
        found = record.get("version")
        raise ValueError(f"{path} is of version {found!r}, but this memtl reads {VERSION}")
    if "weights" in record:
        name, digest, tied = record["weights"], record.get("sha256"), record.get("tied")
        if not isinstance(name, str) or not _WEIGHTS.fullmatch(name):
            raise ValueError(f"{path} is damaged: its weights cannot be {name!r}")
        if not isinstance(digest, str) or not isinstance(tied, dict):
            raise ValueError(f"{path} is damaged: it lacks what goes with its weights")
    return record


def _weights(path: Path, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if sha256_of(path) != digest:
        raise ValueError(f"{path} is damaged, truncated or altered: its sha256 is not {digest}")
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, OSError) as error:
        if not path.exists():  # deleted since its sha256 was taken
            raise FileNotFoundError(f"there is no file {path}") from error
        raise ValueError(f"{path} is damaged: {error}") from error
