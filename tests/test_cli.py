"""The ``memtl`` command."""

import json
import subprocess
import sys

import pytest
import torch

from memtl import _ops
from memtl.cli import main


def test_doctor_is_what_runs_without_a_command(capsys):
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == alone
    assert f"torch {torch.__version__}" in alone
    for op in _ops.NAMES:
        assert op in alone


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "memtl"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "operator" in done.stdout


@pytest.fixture
def tiny_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128,
    ).save_pretrained(tmp_path)  # fmt: skip
    return f"hf:{tmp_path}"


def row(text, label):
    return next(line for line in text.splitlines() if line.startswith(label)).split()


def test_profile_of_a_configuration_on_disk(tiny_bert, capsys):
    assert main(["profile", tiny_bert, "--tokens", "20", "--batch-size", "2", "--coverage"]) == 0
    text = capsys.readouterr().out
    assert "encoder.layer.*.intermediate.dense x2" in text  # the coverage table
    stock, converted, ratio = row(text, "saved for backward")[-3:]
    assert float(stock) > 5 * float(converted)
    assert ratio.endswith("x")
    assert float(row(text, "seconds of a step")[-2]) > 0


def test_profile_of_a_timm_model_by_preset(capsys):
    pytest.importorskip("timm")
    assert main(["profile", "vit_tiny_patch16_224", "--preset", "paper", "--keep", "0.2"]) == 0
    assert row(capsys.readouterr().out, "saved for backward")[-3] == "28.63"  # MiB


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope_patch16"], "timm has no model 'nope_patch16'"),
        (["vit_tiny_patch16_224", "--keep", "0"], "keep must be in (0, 1], got 0"),
        (["vit_tiny_patch16_224", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["hf:nope"], "nope"),
    ],
)
def test_profile_says_what_is_wrong(arguments, said, capsys):
    assert main(["profile", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("memtl profile: ")
    assert captured.out == ""


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as error:
        main(["trian"])
    assert error.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_the_demo_gets_the_rest_of_the_line(tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = ["demo", "--quick", "--json", str(path), "--html", str(tmp_path / "page.html")]
    assert main(arguments) == 0
    assert len(json.loads(path.read_text())["methods"]) == 7
