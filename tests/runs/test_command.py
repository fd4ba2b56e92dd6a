"""``memtl train`` and ``memtl eval``."""

from __future__ import annotations

import json
import os
import signal

import pytest

from memtl.cli import main
from memtl.runs import build, folder
from memtl.runs.settings import read_file
from tests.runs import small

WORDS = ("--model", "small", "--data", "blobs", "steps=4", "batch_size=8", "--device", "cpu")


@pytest.fixture(autouse=True)
def names(monkeypatch, tmp_path):
    """Every name is that of a small network, and of a few images."""
    monkeypatch.setattr(build, "create_model", lambda settings, classes: small.network())
    monkeypatch.setattr(build, "open_data", lambda settings, model=None: small.data())
    monkeypatch.chdir(tmp_path)


def test_a_run_and_its_score(tmp_path, capsys):
    assert main(["train", *WORDS, "--method", "back-razor", "method.keep=0.2"]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "runs" / "small-blobs-back_razor"
    assert "small on blobs, back_razor: 4 steps of 8 samples" in said
    assert "30 samples to train on, 15 to validate on, 12 to test on; 3 classes: dark, mid" in said
    assert f"memtl predict {out.relative_to(tmp_path)} IMAGE" in said
    summary = json.loads((out / folder.SUMMARY).read_text())
    assert f"test accuracy {summary['test_score']:.4f}" in " ".join(said.split())
    assert read_file(out / folder.SETTINGS)["method"][0]["keep"] == 0.2
    assert main(["eval", str(out), "--split", "val", "--json", "score.json"]) == 0
    assert f"accuracy   {summary['val_score']:.4f}" in capsys.readouterr().out
    assert json.loads((tmp_path / "score.json").read_text())["split"] == "val"


def test_a_file_of_settings(tmp_path):
    (tmp_path / "run.yaml").write_text("model: small\ndata: blobs\nsteps: 2\nlearning_rate: 1e-2\n")
    assert main(["train", "--config", "run.yaml", "steps=3", "--out", "r", "device=cpu"]) == 0
    found = read_file(tmp_path / "r" / folder.SETTINGS)
    assert found["steps"] == 3 and found["learning_rate"] == 0.01
    # What a run wrote down is a file of settings too.
    assert main(["train", "--config", "r/run.yaml", "--out", "again"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "small"], "data must be given: --data NAME"),
        ([*WORDS, "--methd", "frozen"], "unknown setting 'methd': did you mean 'method'?"),
        ([*WORDS, "seed=1.5"], "seed must be int, got '1.5'"),
        ([*WORDS, "--config", "none.yaml"], "none.yaml"),
        ([*WORDS, "--device", "tpu9"], "--device tpu9 cannot be used"),
        ([*WORDS, "learning_rate=1e30", "warmup=0"], "the loss is"),
    ],
)
def test_a_wrong_call_is_one_line(words, said, capsys):
    status = main(["train", *words])
    captured = capsys.readouterr().err
    assert status == (1 if said == "the loss is" else 2)
    assert captured.startswith("memtl train: ") and said in captured
    assert len(captured.splitlines()) == 1


def test_eval_of_no_run(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "is no run's folder" in capsys.readouterr().err


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name in ("--learning-rate", "--precision", "--fsdp", "--ema", "method.keep=0.05"):
        assert name in said


def test_an_interrupt_is_the_status_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(settings, classes):
        model = small.network()
        model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return model

    monkeypatch.setattr(build, "create_model", interrupted)
    assert main(["train", *WORDS, "--out", "r", "--fresh"]) == 143
    said = capsys.readouterr().err
    assert "saved after step 1; to go on: memtl train --model small" in said
    assert "--fresh" not in said
    monkeypatch.undo()


def test_under_no_terminal_there_is_no_bar(capsys):
    assert main(["train", *WORDS]) == 0
    assert capsys.readouterr().err == ""
