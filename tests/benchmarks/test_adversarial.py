"""The benchmark of adversarial training: what it counts, and the program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.training import adversarial
from memtl.tasks import Split, load_digits

pytest.importorskip("timm")

ROOT = Path(__file__).parents[2]


def test_bytes_of_the_training_pass_and_of_the_attack():
    task = load_digits(normalised=False)
    batch = Split(task.train.images[:2], task.train.labels[:2])
    rows = {
        name: adversarial.saved(adversarial.build(config, 0), batch)
        for name, config in adversarial.MODES.items()
    }
    stock = rows.pop("stock")
    for row in rows.values():
        assert 5 * row["saved_bytes_per_sample"] < stock["saved_bytes_per_sample"]
        assert 5 * row["attack_saved_bytes_per_sample"] < stock["attack_saved_bytes_per_sample"]


def test_the_table_compares_with_stock():
    modes = [
        {"mode": name, "relative_time": time, "saved_bytes_per_sample": kept,
         "attack_saved_bytes_per_sample": 1024}
        for name, time, kept in (("stock", 1.0, 20480), ("other", 1.5, 2048))
    ]  # fmt: skip
    runs = [
        {"mode": mode, "seed": seed, "accuracy": 0.9, "robust_accuracy": robust + seed / 10}
        for mode, robust in (("stock", 0.5), ("other", 0.45))
        for seed in (0, 1)
    ]
    lines = adversarial.summary({"modes": modes, "runs": runs}).splitlines()
    assert lines[1].split() == ["stock", "20", "1.0x", "1", "1.00x", "90.0", "55.0", "+0.0"]
    assert lines[2].split() == ["other", "2", "10.0x", "1", "1.50x", "90.0", "50.0", "-5.0"]


def test_the_program(tmp_path, monkeypatch, capsys):
    task = load_digits(16, normalised=False)
    few = [Split(s.images[:8], s.labels[:8]) for s in (task.train, task.val, task.test)]
    monkeypatch.setattr(adversarial, "load_digits", lambda **_: type(task)("few", 10, *few))
    monkeypatch.setattr(adversarial, "BATCH", 4)
    output = tmp_path / "results" / "few.json"
    monkeypatch.setattr(
        sys, "argv", ["adversarial.py", "--steps", "2", "--seeds", "1", "--output", str(output)]
    )
    assert adversarial.main() == 0
    record = json.loads(output.read_text())
    assert [row["mode"] for row in record["modes"]] == list(adversarial.MODES)
    assert [run["mode"] for run in record["runs"]] == list(adversarial.MODES)
    assert all(0 <= run["robust_accuracy"] <= run["accuracy"] for run in record["runs"])
    assert record["steps"] == 2 and "seed 0, stock" in capsys.readouterr().out


def test_refuses():
    command = [sys.executable, ROOT / "benchmarks/training/adversarial.py", "--seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 2 and "--seeds must be at least 1, got 0" in done.stderr
