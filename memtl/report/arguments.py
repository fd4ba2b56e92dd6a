"""What the commands take, as types of argparse: a wrong value ends the call and says why."""

from __future__ import annotations

import argparse
from pathlib import Path


def natural(text: str) -> int:
    """A whole number from 0 on."""
    return _at_least(0, text)


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number


def writable(text: str) -> Path:
    """A file in a folder that is there."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot be written: {text} (is its folder there?)")
    return path


def add_running(parser: argparse.ArgumentParser, folder: str) -> None:
    """Options of commands that do many runs: --device, --jobs, --out (``folder``), --json."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--jobs", type=count, default=1, metavar="N",
        help="processes at once, of one thread each (1: this one, with torch's threads)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path(folder), metavar="DIR",
        help=f"folder of runs, tickets and the report ({folder})",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=writable, metavar="PATH", help="write every figure there too"
    )
