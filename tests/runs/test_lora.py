"""Runs of a transformer: LoRA, and checkpointing of its blocks."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import memtl
from memtl import runs
from memtl.runs import build, folder
from memtl.runs.lora import LoRA
from memtl.runs.networks import create
from memtl.runs.records import JSONL, rows
from tests.runs import small

pytest.importorskip("timm")


class Crash(Exception):
    """What ends a process somewhere."""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A transformer of two blocks, which reads the images of `small`."""
    from timm.models.vision_transformer import VisionTransformer

    def network(settings, classes):
        return VisionTransformer(
            img_size=4, patch_size=2, in_chans=1, num_classes=classes, embed_dim=32, depth=2,
            num_heads=2, drop_rate=0.1,
        )  # fmt: skip

    monkeypatch.setattr(build, "create_model", network)
    monkeypatch.setattr(build, "open_data", lambda settings, model=None: small.data())


def train(out, crash: int | None = None, **fields) -> dict:
    def say(line: str) -> None:
        if crash is not None and line.startswith(f"step {crash}:"):
            raise Crash

    return runs.train(small.settings(**{"steps": 8, **fields}), out, say=say)


def losses(out) -> list[float]:
    return [row["loss"] for row in rows(out / JSONL) if "loss" in row]


@pytest.mark.parametrize(
    "fields",
    [
        {"lora": {"rank": 2, "dropout": 0.2}, "method": "frozen"},
        {"method": "checkpoint"},
        {"method": "back-razor,checkpoint"},
        {"method": "low-bit,checkpoint"},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_goes_on_bit_for_bit_and_loads(fields, tmp_path):
    pytest.importorskip("peft")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wanted = train(whole, **fields)
    with pytest.raises(Crash):
        train(cut, crash=8, **fields)
    assert train(cut, **fields)["val_score"] == wanted["val_score"]
    assert losses(cut) == losses(whole) and len(losses(cut)) == 8
    model = runs.load(cut)
    there = load_file(whole / folder.WEIGHTS)
    assert there.keys() == model.state_dict().keys()
    assert all(torch.equal(t, there[name]) for name, t in model.state_dict().items())
    assert runs.evaluate(cut, split="val")["accuracy"] == wanted["val_score"]


def test_frozen_layers_keep_less_and_change_nothing(tmp_path):
    pytest.importorskip("peft")
    fields = {"lora": {"rank": 2, "dropout": 0.2}}
    stock = train(tmp_path / "stock", **fields)
    frozen = train(tmp_path / "frozen", method="frozen", **fields)
    assert losses(tmp_path / "frozen") == losses(tmp_path / "stock")
    assert frozen["saved_bytes_per_sample"] < stock["saved_bytes_per_sample"]
    assert stock["trained_parameters"] == 2 * 2 * (32 + 96) + 3 * 33
    assert json.loads((tmp_path / "frozen" / folder.SUMMARY).read_text())["method"] == (
        "lora + frozen"
    )


@pytest.mark.parametrize("method", ["checkpoint", {"method": "checkpoint", "bits": None}])
def test_checkpoints_keep_less(method, tmp_path):
    stock, kept = train(tmp_path / "stock"), train(tmp_path / "kept", method=method)
    assert kept["saved_bytes_per_sample"] < stock["saved_bytes_per_sample"] / 2
    exact = losses(tmp_path / "kept") == losses(tmp_path / "stock")
    assert exact == isinstance(method, dict)
    train(tmp_path / "library", checkpointing=True)
    assert losses(tmp_path / "library") == losses(tmp_path / "stock")


def test_what_trains_is_saved_and_loaded(tmp_path):
    pytest.importorskip("peft")
    train(tmp_path / "run", lora=2, method="frozen")
    model = runs.load(tmp_path / "run")
    memtl.save(model, tmp_path / "small.safetensors")
    settings = small.settings(lora=2, method="frozen")
    other = build.prepare(build.create_model(settings, 3), settings)
    other.load_state_dict(model.state_dict() | {
        name: torch.zeros_like(p) for name, p in other.named_parameters() if p.requires_grad
    })  # fmt: skip
    memtl.load(other, tmp_path / "small.safetensors")
    for name, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


def test_of_networks_by_name():
    pytest.importorskip("peft")
    model = create("bert", num_classes=3)
    LoRA(rank=2).apply(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trained if name.startswith("model.classifier")}
    assert heads == {"model.classifier.weight", "model.classifier.bias"}
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trained - heads}
    assert adapted == {"query", "value"}


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("cnn", None, "finds no projections of attention in this .*: lora.targets=.* conv_pw"),
        ("vit", "qkv,prj", "finds no layers prj in this network: lora.targets=.* proj, qkv, fc1"),
        ("vit", "head", "finds no layers head"),  # it trains as it is
    ],
)
def test_nothing_to_adapt(name, targets, said):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=said):
        LoRA(targets=targets).apply(create(name, num_classes=3))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora needs peft: pip install memtl\[models\]"):
        LoRA().apply(create("vit", num_classes=3))


def test_a_method_that_would_freeze_it(tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="peft trains .*, which this method would freeze"):
        train(tmp_path, lora=2, method="bitfit")
