"""memtl.save and memtl.load: what is kept, what is refused, and what an interruption leaves."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

import memtl
from memtl.methods import applied
from tests.helpers import assert_same
from tests.methods.networks import images, vit


@pytest.fixture
def model():
    model = vit()
    memtl.apply(model, memtl.VQTConfig(num_queries=2, num_classes=4))
    for p in model.head.parameters():
        nn.init.normal_(p)
    return model


def reloaded(model, directory):
    """A model of the same backbone, with what was saved."""
    fresh = vit()
    own = dict(model.state_dict())
    fresh.load_state_dict({n: own.get(n, t) for n, t in fresh.state_dict().items()}, strict=False)
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            if not name.startswith("head."):
                p.copy_(own[name])
    return fresh, memtl.load(fresh, directory)


def test_only_what_trains_is_saved_and_comes_back(model, tmp_path):
    assert memtl.save(model, tmp_path / "vqt") == tmp_path / "vqt"
    record = json.loads((tmp_path / "vqt" / "memtl.json").read_text())
    assert sorted(os.listdir(tmp_path / "vqt")) == ["memtl.json", record["weights"]]
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert trained < (tmp_path / "vqt" / record["weights"]).stat().st_size < trained + 500

    fresh, report = reloaded(model, tmp_path / "vqt")
    x = images().images
    assert_same(fresh.eval()(x), model.eval()(x))
    assert applied(fresh) == applied(model)
    names = [name for name, _ in report.parameters]
    assert names == ["head.queries", "head.linear.weight", "head.linear.bias"]
    memtl.load(fresh, tmp_path / "vqt")  # once more, into a model that has the method


def test_the_pretrained_model_may_have_another_classifier(tmp_path):
    model = vit()
    memtl.apply(model, memtl.LinearProbeConfig())
    assert applied(model) == (memtl.LinearProbeConfig(num_classes=5),)
    memtl.save(model, tmp_path)
    other = vit(num_classes=1000)
    memtl.load(other, tmp_path)
    assert_same(other.head.weight, model.head.weight)


def test_saving_again_replaces(model, tmp_path):
    memtl.save(model, tmp_path)
    with torch.no_grad():
        model.head.queries.add_(1)
    memtl.save(model, tmp_path)
    assert len(os.listdir(tmp_path)) == 2
    fresh, _ = reloaded(model, tmp_path)
    assert_same(fresh.head.queries, model.head.queries)


@pytest.mark.parametrize("at", ["weights", "record"])
def test_an_interrupted_save_leaves_the_one_before(model, tmp_path, monkeypatch, at):
    memtl.save(model, tmp_path)
    before = model.head.queries.detach().clone()
    with torch.no_grad():
        model.head.queries.add_(1)
    calls = []
    replace = os.replace

    def killed(source, target):
        calls.append(target)
        if len(calls) == {"weights": 1, "record": 3}[at]:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        memtl.save(model, tmp_path)
    monkeypatch.undo()
    fresh, _ = reloaded(model, tmp_path)
    assert_same(fresh.head.queries, before)
    memtl.save(model, tmp_path)
    assert len(os.listdir(tmp_path)) == 2  # and the next one clears up


def test_wrappers_leave_no_prefix(model, tmp_path):
    memtl.save(nn.DataParallel(torch.compile(model)), tmp_path)
    fresh, _ = reloaded(model, tmp_path)
    assert_same(fresh.head.queries, model.head.queries)


def test_a_converted_model_is_saved_with_its_conversion(tmp_path):
    model = vit()
    memtl.apply(model, memtl.BackRazorConfig(keep=0.2))
    model.blocks.requires_grad_(False)
    memtl.save(model, tmp_path)
    fresh = vit()
    fresh.blocks.requires_grad_(False)
    memtl.load(fresh, tmp_path)
    assert applied(fresh) == (memtl.BackRazorConfig(keep=0.2),)
    assert_same(fresh.head.weight, model.head.weight)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no method was applied to this VisionTransformer"):
        memtl.save(vit(), tmp_path)
    model = vit()
    memtl.apply(model, memtl.BackRazorConfig())
    with pytest.raises(ValueError, match="nothing in this VisionTransformer trains"):
        memtl.save(model.requires_grad_(False), tmp_path)
    assert not os.listdir(tmp_path)


def test_what_cannot_be_loaded(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no save: it has no memtl\.json"):
        memtl.load(vit(), tmp_path)
    memtl.save(model, tmp_path)
    other = vit()
    memtl.apply(other, memtl.VQTConfig(num_queries=1))
    with pytest.raises(ValueError, match="other methods, or with other options"):
        memtl.load(other, tmp_path)
    with pytest.raises(ValueError, match=r"linear\.weight' is \[4, 112\] .* needs \[4, 80\]"):
        memtl.load(vit(depth=2), tmp_path)
    trained = vit()
    memtl.apply(trained, memtl.VQTConfig(num_queries=2, num_classes=4))
    trained.norm.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"lacks 'norm\.bias' \(1 missing"):
        memtl.load(trained, tmp_path)
    memtl.save(trained, tmp_path / "more")
    with pytest.raises(ValueError, match=r"has 'norm\.bias', which does not train"):
        memtl.load(vit(), tmp_path / "more")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "record", "unknown"])
def test_damaged_files_are_named(model, tmp_path, damage):
    memtl.save(model, tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    record = tmp_path / "memtl.json"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-7])
        case "altered":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        case "missing":
            weights.unlink()
        case "record":
            record.write_text(record.read_text()[:50])
        case "unknown":
            record.write_text(record.read_text().replace('"vqt"', '"magic"'))
    culprit = {"record": "memtl.json is damaged", "unknown": "'magic'"}.get(damage, weights.name)
    with pytest.raises((ValueError, FileNotFoundError), match=culprit):
        memtl.load(vit(), tmp_path)


def test_other_files_are_left_alone(model, tmp_path):
    (tmp_path / "weights-best.safetensors").write_bytes(b"mine")
    memtl.save(model, tmp_path)
    memtl.save(model, tmp_path)
    assert (tmp_path / "weights-best.safetensors").read_bytes() == b"mine"


def test_what_a_method_made_is_saved_frozen_or_not(model, tmp_path):
    model.head.queries.requires_grad_(False)
    memtl.save(model, tmp_path)
    fresh, _ = reloaded(model, tmp_path)
    assert_same(fresh.head.queries, model.head.queries)
    probe = vit()
    memtl.apply(probe, memtl.LinearProbeConfig())
    memtl.save(probe.requires_grad_(False), tmp_path / "probe")
    fresh = vit()
    memtl.load(fresh, tmp_path / "probe")
    assert_same(fresh.head.weight, probe.head.weight)


def test_running_statistics_of_a_converted_network(tmp_path):
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 2))

    model = net()
    memtl.apply(model, memtl.LowBitConfig())
    model[1].requires_grad_(False)
    model(images().images)
    memtl.save(model, tmp_path)
    fresh = net()
    fresh[1].requires_grad_(False)
    memtl.load(fresh, tmp_path)
    assert_same(fresh[1].running_var, model[1].running_var)
    assert fresh[1].running_var.ne(1).all()


def test_peft_wrappers_stand_for_the_model_inside(tmp_path):
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_modules": ["qkv"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(vit(), peft.LoraConfig(**options))
    memtl.apply(wrapped, memtl.VQTConfig(num_classes=3, train_backbone=True))
    x = images().images
    expected = wrapped.eval()(x)
    assert expected.shape == (12, 3)
    memtl.save(wrapped, tmp_path)
    fresh = vit()
    own = {
        n.replace("base_layer.", ""): t for n, t in wrapped.get_base_model().state_dict().items()
    }
    fresh.load_state_dict(
        {n: own.get(n, t) for n, t in fresh.state_dict().items() if "head" not in n}, strict=False
    )
    fresh = peft.get_peft_model(fresh, peft.LoraConfig(**options))
    memtl.load(fresh, tmp_path)
    assert_same(fresh.eval()(x), expected)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_the_wrapper_of_checkpointing_is_in_no_name(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = vit()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    memtl.apply(model, memtl.BitFitConfig(num_classes=3))
    memtl.save(model, tmp_path)
    fresh = vit()
    trained = memtl.load(fresh, tmp_path)
    assert any(name.startswith("blocks.0.") for name, _ in trained.parameters)
    assert_same(fresh.blocks[0].attn.qkv.bias, model.blocks[0].attn.qkv.bias)
