"""The journal of finished runs: one line of JSON each, on the disk before the next one begins."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Key:
    """What tells a run from others: the data, the network, the method, and how it was trained.

    ``data`` tells images and lists (:attr:`VtabTask.data`), ``weights`` the pre-trained weights;
    ``method`` is a name, which stands for its options; ``learning_rate`` is that of the grid, for a
    batch of 256; ``memtl`` is the version.

    It does not cover the versions of torch, timm and peft, the device, or whether features came
    from a cache, which may all change the last digits; nor code that was changed without a new
    version. After such a change, choose another folder.
    """

    dataset: str
    data: str
    model: str
    weights: str
    method: str
    phase: str
    learning_rate: float
    weight_decay: float
    seed: int
    epochs: int
    batch_size: int
    memtl: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: the accuracy at its end, or None and the error that ended it; its time."""

    key: Key
    accuracy: float | None
    error: str | None
    seconds: float


class Runs:
    """The finished runs of a file, which is made where there is none, and locked until it is
    closed.

    Attributes:
        ignored: bytes of a last line that was not written to its end, and is cut off.

    Raises:
        ValueError: another process has the file open so, or a line is not that of a run.
    """

    def __init__(self, path: Path):
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
            self._runs = dict(
                _parse(line, f"{path}:{number}")
                for number, line in enumerate(content[:whole].splitlines(), 1)
            )
        except ValueError:
            self._file.close()
            raise
        self._file.truncate(whole)

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, key: Key) -> Run | None:
        """The run of that key, if it is finished."""
        return self._runs.get(key)

    def add(self, run: Run) -> None:
        """Write a finished run; once this returns, it is on the disk."""
        self._file.write(json.dumps(dataclasses.asdict(run)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._runs[run.key] = run

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _parse(line: bytes, place: str) -> tuple[Key, Run]:
    try:
        fields = json.loads(line)
        key = Key(**fields.pop("key"))
        return key, Run(key, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{place} is not a run as this version of memtl writes them ({error}): "
            "choose another folder"
        ) from error
