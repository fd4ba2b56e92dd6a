"""Interrupts in an evaluation, in this process."""

from __future__ import annotations

import os
import signal

import pytest

from memtl import runs
from memtl.runs import folder
from memtl.runs.records import JSONL, rows
from tests.runs import small


def curve(out) -> list[dict]:
    times = ("seconds", "samples_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in rows(out / JSONL)]


def train(out, interrupted: int | None = None, **fields) -> list[int]:
    """A run, which may be interrupted in that batch of its evaluations; returns batch sizes."""
    seen: list[int] = []

    def before(model, inputs):
        if model.training:
            return
        seen.append(len(inputs[0]))
        if len(seen) == interrupted:
            os.kill(os.getpid(), signal.SIGTERM)

    model = small.network()
    model.register_forward_pre_hook(before)
    settings = small.settings(**{"batch_size": 4, "save_every": 100, **fields})
    runs.train(settings, out, model=model, data=small.data(), say=None)
    return seen


@pytest.mark.parametrize("fields", [{}, {"ema": 0.8}], ids=["", "average"])
def test_an_evaluation_is_given_up_and_made_up_for(fields, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    seen = train(whole, **fields)
    assert seen[:8] == [4, 4, 4, 3] * 2  # 15 samples
    # One that was given up comes first when the run goes on; batches are counted from there.
    for batch, step in ((2, 4), (1, 4), (6, 8), (1, 8), (6, 12)):
        with pytest.raises(runs.Interrupted) as ended:
            train(cut, batch, **fields)
        assert ended.value.step == step and ended.value.signal == signal.SIGTERM
    assert train(cut, **fields)[:4] == [4, 4, 4, 3]
    assert curve(cut) == curve(whole)
    assert (cut / folder.WEIGHTS).read_bytes() == (whole / folder.WEIGHTS).read_bytes()


def test_a_score_that_no_checkpoint_knew_is_written_once(tmp_path):
    """The process dies between the score that was owed and its checkpoint."""
    train(tmp_path / "whole", steps=4)
    with pytest.raises(runs.Interrupted):
        train(tmp_path / "cut", 1, steps=4)
    row = next(row for row in rows(tmp_path / "whole" / JSONL) if "val_loss" in row)
    with (tmp_path / "cut" / JSONL).open("a") as file:
        file.write(str(row).replace("'", '"') + "\n")
    train(tmp_path / "cut", steps=4)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
