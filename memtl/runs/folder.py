"""The folder of a run: what is in it, and whose it is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import write_aside
from . import settings as own
from .records import CSV, JSONL
from .settings import RunSettings
from .state import Checkpoints

SETTINGS = "run.yaml"
CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"
SUMMARY = "summary.json"
"""Written last: where it is, the run is finished."""

FILES = (SUMMARY, WEIGHTS, JSONL, CSV, SETTINGS)


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder, made where there is none, is one run's at a time, if its file system can lock it.

    Raises:
        ValueError: another process is training in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {out}") from None
        except OSError:
            pass  # some network file systems lock no directories
        yield
    finally:
        os.close(lock)


def begin(out: Path, settings: RunSettings, fresh: bool) -> None:
    """Make ``out`` the folder of this run.

    Raises:
        ValueError: it is another run's: the message says in which settings.
    """
    path = out / SETTINGS
    for name in FILES:  # halves that a kill left
        for aside in out.glob(f".{name}.*"):
            aside.unlink(missing_ok=True)
    if fresh:
        Checkpoints(out / CHECKPOINTS).clear()
        for name in FILES:  # the settings last: so far it is that run's
            (out / name).unlink(missing_ok=True)
    begun = (out / CHECKPOINTS).exists() and any((out / CHECKPOINTS).iterdir())
    if path.exists() and begun:  # a call that failed before that has nothing to lose
        there = read(out)
        if other := own.differences(there, settings):
            name = other[0]
            more = f" ({', '.join(other[1:])} too)" if other[1:] else ""
            was, now = there.to_dict()[name], settings.to_dict()[name]
            raise ValueError(
                f"{out} is of another run, in which {name} is {was!r}, not {now!r}{more}. Go on "
                "with its settings, choose another --out, or begin again with --fresh"
            )
    elif begun:
        raise ValueError(f"{out} has checkpoints, but no {SETTINGS}: choose another --out")
    write_aside(path, lambda aside: own.write_file(aside, settings))


def read(out: Path) -> RunSettings:
    """The settings of the run in ``out``.

    Raises:
        ValueError: there is none, or its settings are damaged.
    """
    path = out / SETTINGS
    if not path.is_file():
        raise ValueError(f"{out} is no run's folder: it has no {SETTINGS}")
    try:
        return own.read(own.read_file(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def summary(out: Path) -> dict[str, Any] | None:
    """The summary of a run that is finished."""
    path = out / SUMMARY
    return json.loads(path.read_text()) if path.exists() else None
