"""The journal of finished runs: one line of JSON each, on the disk before the next one begins."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import typing
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class Finished(Protocol):
    """A frozen dataclass whose ``key``, another one, tells it from others; what both hold besides
    are numbers, strings and None."""

    @property
    def key(self) -> Any: ...


R = TypeVar("R", bound=Finished)
J = TypeVar("J", bound="Journal[Any]")


class Journal(Generic[R]):
    """The finished runs of a file, which is made where there is none, and locked until it is
    closed.

    Args:
        path: of the file.
        run: the class of the runs, see :class:`Finished`.

    Attributes:
        ignored: bytes of a last line that was not written to its end, and is cut off.

    Raises:
        ValueError: another process has the file open so, or a line is not that of a run.
    """

    def __init__(self, path: Path, run: Callable[..., R]):
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"{path} is being written by another process") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self.ignored = len(content) - whole
        try:
            found = (
                _parse(run, line, f"{path}:{number}")
                for number, line in enumerate(content[:whole].splitlines(), 1)
            )
            self._runs: dict[Hashable, R] = {done.key: done for done in found}
        except ValueError:
            self._file.close()
            raise
        self._file.truncate(whole)

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[R]:
        return iter(self._runs.values())

    def find(self, key: Hashable) -> R | None:
        """The run of that key, if it is finished."""
        return self._runs.get(key)

    def add(self, run: R) -> None:
        """Write a finished run; once this returns, it is on the disk."""
        fields = dataclasses.asdict(run)  # type: ignore[call-overload]
        self._file.write(json.dumps(fields).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._runs[run.key] = run

    def __enter__(self: J) -> J:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _parse(run: Callable[..., R], line: bytes, place: str) -> R:
    try:
        fields = json.loads(line)
        key = typing.get_type_hints(run)["key"](**fields.pop("key"))
        return run(key=key, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{place} is not a run as this version of memtl writes them ({error}): "
            "choose another folder"
        ) from error
