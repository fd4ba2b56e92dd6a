"""metrics.jsonl and metrics.csv: a line a step and a line an evaluation, each written whole."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import write_aside

JSONL, CSV, EVENTS = "metrics.jsonl", "metrics.csv", "tensorboard"


class Records:
    """The records of a run, up to ``step``; what comes after it is cut off, for a run that goes on
    from there writes it again. Rows have a ``step``, and ``columns`` besides.

    A row is one call of the operating system: a process that is killed leaves no half of one.

    Args:
        tensorboard: whether to write events for it too.
        scored: whether scores of the model after that step are kept.

    Raises:
        ImportError: ``tensorboard`` is asked for, but not installed.
    """

    def __init__(self, folder: Path, columns: tuple[str, ...], step: int, tensorboard: bool,
                 scored: bool = True):  # fmt: skip
        self._columns = ("step", *columns)
        self._board = _board(folder / EVENTS, step) if tensorboard else None
        kept = [
            row for row in rows(folder / JSONL, step)
            if scored or row["step"] < step or "loss" in row
        ]  # fmt: skip
        lines = b"".join(_json(row) for row in kept)
        table = b"".join((self._line(dict(zip(self._columns, self._columns, strict=True))),
                          *map(self._line, kept)))  # fmt: skip
        self._files = []
        for name, content in ((JSONL, lines), (CSV, table)):
            path = folder / name
            if not path.exists() or path.read_bytes() != content:
                write_aside(path, functools.partial(_write, content))
            self._files.append(path.open("ab", buffering=0))

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row."""
        jsonl, table = self._files
        jsonl.write(_json(row))
        table.write(self._line(row))
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "epoch") and value is not None:
                    self._board.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Once this returns, what was added is on the disk."""
        for file in self._files:
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Nothing is added any more."""
        for file in self._files:
            file.close()
        if self._board is not None:
            self._board.close()

    def _line(self, row: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["" if row.get(c) is None else row[c] for c in self._columns])
        return text.getvalue().encode()


def rows(path: Path, step: int | None = None) -> Iterator[dict[str, Any]]:
    """The whole rows of a metrics.jsonl, up to that step; none where there is no file."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            late = step is not None and row["step"] > step
        except (ValueError, TypeError, KeyError):
            return
        if late or not line.endswith(b"\n"):
            return
        yield row


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _json(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("tensorboard is not installed: pip install memtl[train]") from None
    return SummaryWriter(str(folder), purge_step=step + 1)
