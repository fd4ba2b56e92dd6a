"""The model card that memtl.save writes, and the cards that it leaves alone."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import memtl
from memtl.methods.base.card import MARKER, base_model
from tests.methods.networks import vit


def header(card):
    """The YAML in front, read by hand: keys with a value, and the list of tags."""
    assert card.startswith("---\n")
    return card.split("---\n")[1].splitlines()


def test_a_card_says_what_was_applied_and_how_to_load_it(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    memtl.apply(model, memtl.VQTConfig(num_queries=2, num_classes=4))
    memtl.save(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert header(card) == [
        "library_name: memtl",
        "base_model: timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "tags:",
        "- memtl",
        "- vqt",
    ]
    assert "| 1 | vqt | `memtl.VQTConfig(num_classes=4, num_queries=2)` |" in card
    trained, total = memtl.trainable_parameters(model)
    assert f"trainable params: {trained:,} || all params: {total:,}" in card
    (weights,) = tmp_path.glob("*.safetensors")
    assert f"saved: {weights.stat().st_size:,} bytes of weights" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) == 4
    assert 'timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True)' in code
    code = code.replace("pretrained=True", "pretrained=False").replace('"."', repr(str(tmp_path)))
    loaded = {}
    exec(code, loaded)
    torch.testing.assert_close(loaded["model"].head.queries, model.head.queries)


def test_the_head_of_a_converted_model_has_to_be_there(tmp_path):
    model = timm.create_model("mobilenetv2_050", num_classes=10)
    memtl.apply(model, memtl.LowBitConfig(bits=3))
    memtl.save(model, tmp_path, weights=False)
    card = (tmp_path / "README.md").read_text()
    assert "`memtl.LowBitConfig(bits=3)`" in card
    assert "pretrained=True, num_classes=10)" in card
    assert "saved: none: this is the configuration alone" in card


def test_every_method_is_a_row(tmp_path):
    model = vit()
    memtl.apply(model, memtl.BackRazorConfig(keep=0.2, exclude_modules=r"head|blocks\..*"))
    memtl.apply(model, memtl.VQTConfig(num_classes=3, train_backbone=True))
    memtl.save(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "- back_razor\n- vqt\n" in card
    rows = [line for line in card.splitlines() if re.match(r"\| \d", line)]
    assert [row.split(" | ")[1] for row in rows] == ["back_razor", "vqt"]
    assert r"exclude_modules='head\|blocks" in rows[0]


def test_transformers_models_are_loaded_by_their_class(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    memtl.apply(model, memtl.BackRazorConfig())
    memtl.save(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model" not in card
    assert "# the pre-trained ViTForImageClassification, as before memtl.apply" in card
    model.config._name_or_path = "google/vit-base-patch16-224"
    memtl.save(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: google/vit-base-patch16-224" in header(card)
    load = 'ViTForImageClassification.from_pretrained("google/vit-base-patch16-224", num_labels=5)'
    assert f"model = transformers.{load}" in card


def test_base_models_are_names_on_the_hub_alone(tmp_path):
    def named(name):
        model = nn.Linear(2, 2)
        model.config = SimpleNamespace(_name_or_path=name)
        return base_model(model)

    assert named("org/some.model-2") == "org/some.model-2"
    assert named("gpt2") == "gpt2"
    for other in (str(tmp_path), "", "./here", "a/b/c", "a: b", None, "../x"):
        assert named(other) is None
    assert base_model(nn.Linear(2, 2)) is None


def test_cards_by_others_are_left_alone(tmp_path):
    model = vit()
    memtl.apply(model, memtl.LinearProbeConfig())
    card = tmp_path / "README.md"
    card.write_bytes(b"# mine \xff")
    memtl.save(model, tmp_path)
    assert card.read_bytes() == b"# mine \xff"
    card.unlink()
    memtl.save(model, tmp_path)
    own = card.read_text()
    assert MARKER in own
    card.write_text(own + "changed")
    memtl.save(model, tmp_path)
    assert card.read_text() == own
    card.write_text(own.replace(MARKER, "") + "mine now")
    memtl.save(model, tmp_path)
    assert card.read_text().endswith("mine now")
