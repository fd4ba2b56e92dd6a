import dataclasses
import json
import signal
import subprocess
import sys

import pytest

from memtl.vtab import Key, Protocol, Run, Runs
from tests.helpers import ROOT
from tests.vtab import small

KEY = Key("dtd", "blobs", "linear", "none", "linear", "search", 0.1, 0.0, 5, 3, 8, "0.1")

# A protocol that dies at a place of the n-th training: in the middle of it, or once it is written.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from memtl.vtab import Protocol, Runs
from memtl.vtab import protocol, runs
from tests.vtab import small

place, n = sys.argv[2], int(sys.argv[3])
calls = []

def dying(fn):
    def call(*arguments, **keywords):
        calls.append(fn)
        if len(calls) == n and place != "written":
            if place == "writing":
                file = arguments[0]._file
                file.write(b'{"key": {"dataset"')
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        result = fn(*arguments, **keywords)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if place == "training":
    protocol.evaluate = dying(protocol.evaluate)
else:
    runs.Runs.add = dying(runs.Runs.add)
with Runs(Path(sys.argv[1])) as found:
    Protocol(3, 8, (1, 2), 5).run(small.task(), small.METHOD, found, **small.KEYS)
"""


def lines(path) -> list[dict]:
    """What it holds, without the times."""
    return [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("place", "n", "left"),
    [("training", 3, 2), ("writing", 3, 2), ("written", 4, 4)],
)
def test_killed_it_goes_on_where_it_was(tmp_path, place, n, left, monkeypatch):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "runs.jsonl"
    protocol = Protocol(3, 8, (1, 2), 5)
    with Runs(whole) as runs:
        expected = protocol.run(small.task(), small.METHOD, runs, **small.KEYS)
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(path), place, str(n)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    built = []
    method = dataclasses.replace(
        small.METHOD, build=lambda *arguments: built.append(0) or small.build(*arguments)
    )
    with Runs(path) as runs:
        assert len(runs) == left
        assert bool(runs.ignored) == (place == "writing")
        assert protocol.run(small.task(), method, runs, **small.KEYS) == expected
    assert len(built) == 6 - left, "what was finished is not done again"
    assert lines(path) == lines(whole)


def test_what_is_written_is_found_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    run = Run(KEY, 1 / 3, None, 2.5)
    with Runs(path) as runs:
        assert len(runs) == 0 and runs.find(KEY) is None
        runs.add(run)
        assert runs.find(KEY) == run
    failed = Run(dataclasses.replace(KEY, seed=6), None, "the loss is nan", 1.0)
    with Runs(path) as runs:
        assert (len(runs), runs.find(KEY), runs.ignored) == (1, run, 0)
        runs.add(failed)
    with Runs(path) as runs:
        assert runs.find(failed.key) == failed


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Key)])
def test_a_run_of_other_settings_is_another(tmp_path, field):
    value = getattr(KEY, field)
    other = dataclasses.replace(
        KEY, **{field: value + (1 if isinstance(value, (int, float)) else "x")}
    )
    with Runs(tmp_path / "runs.jsonl") as runs:
        runs.add(Run(other, 0.5, None, 1.0))
        assert runs.find(KEY) is None


def test_a_half_written_line_is_cut_off(tmp_path):
    path = tmp_path / "runs.jsonl"
    with Runs(path) as runs:
        runs.add(Run(KEY, 0.5, None, 1.0))
    line = path.read_bytes()
    for cut in (1, len(line) // 2, len(line) - 1):
        path.write_bytes(line + line[:cut])
        with Runs(path) as runs:
            assert (runs.ignored, len(runs)) == (cut, 1)
        assert path.read_bytes() == line


@pytest.mark.parametrize(
    "wrong",
    [
        b"nonsense",
        b"[]",
        b'{"accuracy": 1}',
        b'{"key": {"dataset": "dtd"}, "accuracy": 1, "error": null, "seconds": 1}',
        json.dumps(
            {
                "key": {**dataclasses.asdict(KEY), "crop": 1},
                "accuracy": 1,
                "error": None,
                "seconds": 1,
            }
        ).encode(),
    ],
)
def test_what_is_not_told_apart_is_refused(tmp_path, wrong):
    path = tmp_path / "runs.jsonl"
    with Runs(path) as runs:
        runs.add(Run(KEY, 0.5, None, 1.0))
    content = path.read_bytes() + wrong + b"\n"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}:2 is not a run .*choose another folder"):
        Runs(path)
    assert path.read_bytes() == content, "left as it was"


def test_one_process_at_a_time(tmp_path):
    with Runs(tmp_path / "runs.jsonl"):
        with pytest.raises(ValueError, match="runs.jsonl is being written by another process"):
            Runs(tmp_path / "runs.jsonl")
    Runs(tmp_path / "runs.jsonl").__exit__()
