"""The records of a run: rows, whole lines, and what a resume cuts off."""

from __future__ import annotations

import csv
import json
import sys
import types

import pytest

from memtl.runs.records import CSV, JSONL, Records, rows


def write(folder, step: int, numbers, tensorboard: bool = False) -> None:
    log = Records(folder, ("loss", "score"), step, tensorboard)
    for number in numbers:
        log.add({"step": number, "loss": number / 3})
        if number % 2 == 0:
            log.add({"step": number, "loss": None, "score": 0.5})
    log.flush()
    log.close()


def test_both_files_have_every_row(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    lines = [json.loads(line) for line in (tmp_path / JSONL).read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 2, 3]
    with (tmp_path / CSV).open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["1", "2", "2", "3"]
    assert float(table[3]["loss"]) == lines[3]["loss"] == 1.0
    assert table[2] == {"step": "2", "loss": "", "score": "0.5"}


def test_going_on_writes_no_row_twice(tmp_path):
    write(tmp_path, 0, range(1, 8))
    whole = {name: (tmp_path / name).read_bytes() for name in (JSONL, CSV)}
    write(tmp_path, 4, [5, 6, 7])  # what was written after step 4 is written again
    assert {name: (tmp_path / name).read_bytes() for name in (JSONL, CSV)} == whole
    write(tmp_path, 0, [])
    assert (tmp_path / JSONL).read_bytes() == b""
    assert (tmp_path / CSV).read_text() == "step,loss,score\n"


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_is_cut_off(cut, tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    for name in (JSONL, CSV):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in rows(tmp_path / JSONL)] == [1, 2, 2]
    write(tmp_path, 2, [3])
    assert [row["step"] for row in rows(tmp_path / JSONL)] == [1, 2, 2, 3]
    assert (tmp_path / CSV).read_text().splitlines()[-1] == "3,1.0,"


def test_tensorboard_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install memtl\[train\]"):
        Records(tmp_path, (), 0, True)


def test_tensorboard_is_told_numbers_and_where_to_go_on(tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append(purge_step)

        def add_scalar(self, *arguments):
            told.append(arguments)

        def flush(self): ...
        def close(self): ...

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    write(tmp_path, 3, [4], tensorboard=True)
    assert told == [4, ("loss", 4 / 3, 4), ("score", 0.5, 4)]
