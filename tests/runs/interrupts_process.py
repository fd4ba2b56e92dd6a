"""Runs that are interrupted, each in a fork of this process; prints what became of them.

interrupts_process.py FOLDER
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch._dynamo  # optimizers import it: once, before the forks

from memtl import runs
from tests.runs import small

CONTEXT = multiprocessing.get_context("fork")


def train(out: Path, said, pause: float, errors: Path) -> None:
    """A run that pauses where it says something; the exit status is that of the command."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)

    def say(line: str) -> None:
        said.send(line)
        if line.startswith("step "):
            time.sleep(pause)

    settings = small.settings(steps=6, eval_every=2, save_every=6)
    try:
        runs.train(settings, out, model=small.network(), data=small.data(), say=say)
    except runs.Interrupted as interrupted:
        sys.exit(128 + interrupted.signal)


def run(out: Path, pause: float = 0, *signals: int) -> tuple[int, str]:
    """Send the signals when it says its first score; exit status and what it complained of."""
    listening, said = CONTEXT.Pipe(duplex=False)
    errors = out.with_suffix(".errors")
    child = CONTEXT.Process(target=train, args=(out, said, pause, errors))
    child.start()
    while signals and not listening.recv().startswith("step "):
        pass
    for number in signals:
        os.kill(child.pid, number)
        while "finishing" not in errors.read_text():  # so that it is not merged with the next
            time.sleep(0.01)
    child.join()
    return child.exitcode, errors.read_text()


def main() -> None:
    place = Path(sys.argv[1])
    whole, cut, twice = place / "whole", place / "cut", place / "twice"
    results = {
        "whole": run(whole),
        "ctrl-c": run(cut, 0.5, signal.SIGINT),
        "term": run(cut, 0.5, signal.SIGTERM),
        "rest": run(cut),
        "twice": run(twice, 60, signal.SIGINT, signal.SIGINT),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
