"""``memtl bench fidelity``."""

import json
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from memtl.cli import main
from memtl.fidelity import command, configurations

MODELS = list(command.SHIPPED)
FORMATS = ["q4", "topk10"]


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setenv("MEMTL_PROGRESS", "0")


@pytest.mark.parametrize("model", MODELS)
def test_on_a_shipped_network(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["bench", "fidelity", model, "--batch-size", "2", "--formats", *FORMATS]
    assert main([*arguments, "--output", str(tmp_path / "found")]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "found" / "fidelity.json").read_text())
    labels = [row["label"] for row in record["configurations"]]
    assert labels[:10] == list(configurations())
    roles = {row["role"] for row in record["roles"]}
    assert len(record["roles"]) == len(FORMATS) * len(roles)
    assert roles | set(record["absent"]) == {
        "linear", "convolution", "attention", "norm", "activation",
    }  # fmt: skip
    rows = {row["label"]: row for row in record["configurations"]}
    assert not any(row["error"] for row in (*rows.values(), *record["roles"]))
    mean = {name: row["weights"]["mean_cosine"] for name, row in rows.items()}
    assert mean["low-bit 2"] < mean["low-bit 3"] < mean["low-bit 4"] < mean["low-bit 8"]
    assert rows["low-bit 4"]["bytes"] < record["stock_bytes"] / 8
    assert " ".join(["memtl", *arguments]) in record["command"]

    page = (tmp_path / "found" / "fidelity.html").read_text(encoding="utf-8")
    shown = "".join(ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n")).itertext())
    for label in labels:
        assert label in text and label in shown
    for layer in rows["low-bit 4"]["depths"]:
        assert layer in text and layer in shown
    assert page.count("<svg") == 2 + len(roles)
    stripped = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http://" not in stripped and "https://" not in stripped


def test_after_an_epoch_without_output(monkeypatch, capsys):
    fitted = []
    monkeypatch.setattr(command, "fit", lambda model, *a, **k: fitted.append(a[2].steps) or HISTORY)
    monkeypatch.setattr(command, "measure", lambda *a, **k: "the result")
    assert main(["bench", "fidelity", "cnn", "--epochs", "2"]) == 0
    assert fitted == [2 * 1000 // command.FIT_BATCH]
    assert "the result" in capsys.readouterr().out


class HISTORY:
    val_score = 0.9


def test_a_model_of_token_ids(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    arguments = ["--tokens", "8", "--batch-size", "2", "--formats", "q8"]
    data = tmp_path / "bert.json"
    assert main(["bench", "fidelity", f"hf:{tmp_path}", *arguments, "--output", str(data)]) == 0
    rows = json.loads(data.read_text())["configurations"]
    assert data.with_suffix(".html").exists()
    assert rows[0]["weights"]["worst_cosine"] > 0.99
    assert next(iter(reversed(rows[0]["depths"]))) == "embeddings.LayerNorm"
    assert "no layer of the role convolution" in capsys.readouterr().out


def test_a_direction_is_the_same_every_time():
    model = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    step = command.along_a_direction(lambda m: {"a": m(x), "b": [m(x) * 2, torch.ones(2)]})
    assert step(model) == step(model)
    with pytest.raises(ValueError, match="no output needs a gradient"):
        command.along_a_direction(lambda m: torch.ones(2))(model)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vit", "--formats", "q4", "q5"], "format 'q5': bits must be one of"),
        (["vit", "--worst", "1.2"], "worst must be in [0, 1], got 1.2"),
        (["vit", "--mean", "-1"], "mean must be in [0, 1], got -1"),
        (["vit", "--batch-size", "0"], "--batch-size must be in [1, 1000], got 0"),
        (["vit", "--epochs", "-1"], "--epochs must be at least 0, got -1"),
        (["vit", "--device", "nowhere"], "--device nowhere cannot be used"),
        (["resnet18", "--epochs", "1"], "--epochs is for vit and cnn"),
        (["nope_patch16"], "timm has no model 'nope_patch16'"),
        (["hf:nope"], "nope"),
    ],
)
def test_what_is_wrong_is_said(arguments, said, capsys):
    assert main(["bench", "fidelity", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("memtl bench fidelity: ") and said in captured.err
    assert captured.out == ""


def test_bench_wants_a_measurement(capsys):
    assert main(["bench", "speed"]) == 2
    assert "measurement" in capsys.readouterr().err
    assert main(["bench"]) == 0  # which there are
    assert "memtl bench MEASUREMENT" in capsys.readouterr().out


def test_help_names_the_formats(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "fidelity", "--help"])
    assert "topkN" in capsys.readouterr().out
