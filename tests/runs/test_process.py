"""Runs in processes of their own: killed, interrupted, several of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memtl.runs import folder
from memtl.runs.records import JSONL, rows
from tests.helpers import ROOT
from tests.runs import several_process

HERE = Path(__file__).parent


def call(*words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out / JSONL) if "loss" in row]


def test_kills_at_random_moments(tmp_path):
    output = tmp_path / "kills.json"
    call(ROOT / "benchmarks" / "training" / "kills.py", "--kills", 6, "--output", output)
    found = json.loads(output.read_text())
    assert found["kills"] == found["resumed"] == 6 and found["damaged"] == []
    assert found["identical"] == found["runs"] >= 1 and found["failed"] == 0


def test_an_interrupt_saves_and_another_ends_at_once(tmp_path):
    found = json.loads(call(HERE / "interrupts_process.py", tmp_path).splitlines()[-1])
    statuses = {name: status for name, (status, _) in found.items()}
    assert statuses.pop("twice") in (1, -signal.SIGINT)  # KeyboardInterrupt, not caught
    assert statuses == {"whole": 0, "ctrl-c": 130, "term": 143, "rest": 0}
    for name in ("ctrl-c", "term"):
        assert "finishing this step, then saving; Ctrl-C again ends at once" in found[name][1]
    assert "KeyboardInterrupt" in found["twice"][1]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "cut")) == 6 > len(losses(tmp_path / "twice"))


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("several")
    call("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
         HERE / "several_process.py", place)  # fmt: skip
    several_process.train(place / "alone", batch_size=8)
    several_process.train(place / "lora-alone", batch_size=8, **several_process.LORA)
    return place


@pytest.mark.parametrize("name", ["ddp", "fsdp", "parts", "lora-ddp", "lora-fsdp"])
def test_two_processes_are_one_with_twice_the_batch(name, several):
    alone, both = several / ("lora-alone" if "lora" in name else "alone"), several / name
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4) and len(losses(both)) == 6
    one, two = (json.loads((out / folder.SUMMARY).read_text()) for out in (alone, both))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert (two["val_score"], two["test_score"]) == (one["val_score"], one["test_score"])
    found = load_file(both / folder.WEIGHTS)
    for weight, t in load_file(alone / folder.WEIGHTS).items():
        torch.testing.assert_close(found[weight], t, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_go_on_bit_for_bit(name, several):
    whole, again = several / name, several / f"{name}-again"
    assert losses(again) == losses(whole)
    found = load_file(again / folder.WEIGHTS)
    for weight, t in load_file(whole / folder.WEIGHTS).items():
        assert torch.equal(found[weight], t), weight


def test_an_interrupt_of_one_process_ends_both(several):
    for rank in range(2):
        assert json.loads((several / f"ends-{rank}.json").read_text()) == [1, 2, 3, 3]
    assert losses(several / "cut") == losses(several / "ddp")
    one, two = (json.loads((several / n / folder.SUMMARY).read_text()) for n in ("ddp", "cut"))
    assert one["val_score"] == two["val_score"] and one["best_step"] == two["best_step"]


def test_a_run_of_two_processes_is_not_one_of_one(several):
    (several / "ddp" / folder.SUMMARY).unlink()
    with pytest.raises(ValueError, match="a run on 2 processes, not on 1"):
        several_process.train(several / "ddp", batch_size=4)
