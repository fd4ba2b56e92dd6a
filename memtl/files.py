"""Writing files so that an interrupted write leaves what was there before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def write_aside(
    path: Path, write: Callable[[Path], object], named: Callable[[str], str] | None = None
) -> str:
    """Let ``write`` make a file beside ``path``, bring it to the disk and give it that name; or the
    one that ``named`` makes of its sha256.

    Returns:
        The sha256 of its content.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        digest = sha256_of(aside)
        os.replace(aside, path if named is None else path.with_name(named(digest)))
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name itself
    finally:
        os.close(folder)
    return digest


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
