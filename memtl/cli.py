"""The ``memtl`` command: which commands there are. Each is a program of its own, imported when it
is called."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """What ``memtl --help`` says of a command, and the function that gets the rest of the line and
    returns the exit status: 0; 1 where a training diverged or a process died; 2 for a wrong call.
    """

    help: str
    module: str
    function: str = "main"


COMMANDS = {
    "doctor": Command("versions, what loaded or why not, who serves what", ".cli", "doctor"),
    "profile": Command("bytes a model saves for backward, stock and converted", ".profile"),
    "estimate": Command(
        "training memory by method, predicted; the largest batch that fits", ".estimate.command"
    ),
    "train": Command(
        "fine-tune a model: a folder of results, to go on from", ".runs.command", "train"
    ),
    "eval": Command("how good the model of a run is", ".runs.command", "evaluate"),
    "predict": Command("what the model of a run says of images or texts", ".runs.predictions"),
    "prune": Command("draw a lottery ticket of a model: which weights survive", ".runs.prune"),
    "bench": Command("measurements: fidelity of gradients, kernels, whole steps", ".bench"),
    "demo": Command("fine-tune handwritten digits several ways and compare", ".demo"),
    "vtab": Command("compare methods on VTAB-1k by its published protocol", ".vtab.command"),
    "tickets": Command(
        "lottery tickets of a pre-trained encoder: which match it", ".lottery.command"
    ),
    "doublewin": Command(
        "tickets of robustly pre-trained networks, transferred", ".doublewin.command"
    ),
}
"""A new command is a row here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; without one, say which there are. Returns the exit status.

    Where nobody reads the output any more (``memtl ... | head``), the command ends with status 1.
    """
    try:
        status = _run([*(sys.argv[1:] if argv is None else argv)] or ["--help"])
        if sys.stdout is not None:  # it was closed before
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        if hasattr(select, "poll"):  # not on Windows
            output = select.poll()
            output.register(1, 0)  # errors alone
            if not output.poll(0):
                raise  # a pipe of the command's own
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more
        return 1


def _run(line: list[str]) -> int:
    name, *rest = line
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        import memtl

        print(f"memtl {memtl.__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"do you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"memtl: there is no command {name!r}: {hint}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module, __package__), command.function)(rest)


def overview() -> str:
    """Every command, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: memtl COMMAND ...",
            "",
            "Memory-efficient transfer learning.",
            "",
            *lines,
            "",
            "memtl COMMAND --help says what a command takes, memtl --version which memtl this is.",
        )
    )


def doctor(argv: Sequence[str]) -> int:
    """Run ``memtl doctor``; returns the exit status."""
    from . import backends

    argparse.ArgumentParser(
        prog="memtl doctor",
        description="Versions, what loaded or why not, and who serves which operator where.",
    ).parse_args(argv)
    print(backends.report())
    return 0
