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
    assert sorted(os.listdir(tmp_path / "vqt")) == ["README.md", "memtl.json", record["weights"]]
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
    assert len(os.listdir(tmp_path)) == 3
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
    with pytest.raises(ValueError, match="nothing in this VisionTransformer trains.*weights=False"):
        memtl.save(model.requires_grad_(False), tmp_path)
    with pytest.raises(ValueError, match="no method was applied to this Sequential: save its '0'"):
        memtl.save(nn.Sequential(model, nn.GELU()), tmp_path)
    assert not os.listdir(tmp_path)
    with pytest.raises(TypeError, match="weights must be a bool"):
        memtl.save(model, tmp_path, weights=1)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        memtl.save(None, tmp_path)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        memtl.load(None, tmp_path)


def test_the_configuration_alone(model, tmp_path):
    memtl.save(model, tmp_path)
    memtl.save(model.requires_grad_(False), tmp_path, weights=False)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "memtl.json"]
    fresh = vit()
    before = fresh.patch_embed.proj.weight.detach().clone()
    report = memtl.load(fresh, tmp_path)
    assert applied(fresh) == applied(model)
    assert report.count == sum(p.numel() for p in fresh.head.parameters())
    assert_same(fresh.patch_embed.proj.weight, before)
    converted = vit()
    memtl.apply(converted, memtl.BackRazorConfig(keep=0.2))
    memtl.save(converted, tmp_path, weights=False)
    fresh = vit()
    memtl.load(fresh, tmp_path)
    fresh.load_state_dict(converted.state_dict())
    x = images().images
    assert_same(fresh.eval()(x), converted.eval()(x))


def test_a_tensor_of_two_names_is_saved_once(tmp_path):
    def network(tied):
        model = nn.Sequential(nn.Embedding(9, 4), nn.GELU(), nn.Linear(4, 9, bias=False))
        if tied:
            model[2].weight = model[0].weight
        memtl.apply(model, memtl.BackRazorConfig())
        return model

    model = network(tied=True)
    memtl.save(model, tmp_path)
    record = json.loads((tmp_path / "memtl.json").read_text())
    assert record["tied"] == {"2.weight": "0.weight"}
    assert (tmp_path / record["weights"]).stat().st_size < 2 * 9 * 4 * 4
    for tied in (True, False):
        fresh = network(tied)
        memtl.load(fresh, tmp_path)
        assert_same(fresh[0].weight, model[0].weight)
        assert_same(fresh[2].weight, model[0].weight)
    apart = network(tied=False)
    memtl.save(apart, tmp_path)
    with pytest.raises(ValueError, match=r"'2.weight' and '0.weight' are one tensor here"):
        memtl.load(model, tmp_path)
    with torch.no_grad():
        apart[2].weight.copy_(apart[0].weight)
    memtl.save(apart, tmp_path)
    memtl.load(model, tmp_path)
    assert_same(model[0].weight, apart[0].weight)


def test_what_cannot_be_loaded(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no save: it has no memtl\.json"):
        memtl.load(vit(), tmp_path)
    memtl.save(model, tmp_path)
    other = vit()
    memtl.apply(other, memtl.VQTConfig(num_queries=1))
    with pytest.raises(ValueError, match="other methods, or with other options"):
        memtl.load(other, tmp_path)
    match = r"linear.weight' is \[4, 112\] .* \[4, 80\].*, 'head.queries' is \[3, 2, 16\]"
    with pytest.raises(ValueError, match=match):
        memtl.load(vit(depth=2), tmp_path)
    trained = vit()
    memtl.apply(trained, memtl.VQTConfig(num_queries=2, num_classes=4))
    trained.norm.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"the save lacks 'norm\.bias'$"):
        memtl.load(trained, tmp_path)
    memtl.save(trained, tmp_path / "more")
    with pytest.raises(ValueError, match=r"it has 'norm\.bias', which does not train here"):
        memtl.load(vit(), tmp_path / "more")


@pytest.mark.parametrize("damage", ["altered", "missing", "unknown"])
def test_damaged_files_are_named(model, tmp_path, damage):
    memtl.save(model, tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    record = tmp_path / "memtl.json"
    match damage:
        case "altered":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        case "missing":
            weights.unlink()
        case "unknown":
            record.write_text(record.read_text().replace('"vqt"', '"magic"'))
    culprit = {"unknown": "'magic'"}.get(damage, weights.name)
    with pytest.raises((ValueError, FileNotFoundError), match=culprit):
        memtl.load(vit(), tmp_path)


def test_files_cut_short_anywhere(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.GELU())
    memtl.apply(model, memtl.BackRazorConfig())
    memtl.save(model, tmp_path)
    own = model[0].weight.detach().clone()
    (weights,) = tmp_path.glob("*.safetensors")
    for path in (weights, tmp_path / "memtl.json"):
        content = path.read_bytes()
        for length in range(len(content.rstrip())):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=f"{path.name}.* is damaged"):
                memtl.load(model, tmp_path)
        path.write_bytes(content)
    assert_same(model[0].weight, own)
    memtl.load(model, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": "vqt"},
        {"methods": [5]},
        {"methods": [{"method": "vqt", "num_queries": "two"}]},
        {"methods": [{"method": "vqt", "queries": 2}]},
        {"version": 2},
        {"version": None},
        {"weights": "../weights-0123456789ab.safetensors"},
        {"weights": 5},
        {"sha256": None},
        {"tied": []},
        [],
    ],
)
def test_records_that_say_something_else(model, tmp_path, changes):
    memtl.save(model, tmp_path)
    path = tmp_path / "memtl.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changes if isinstance(changes, dict) else changes))
    fresh = vit()
    with pytest.raises(ValueError, match=r"memtl\.json"):
        memtl.load(fresh, tmp_path)
    assert applied(fresh) == ()


def test_every_entry_that_does_not_fit_is_named_or_counted(tmp_path):
    def network(*sizes, dtype=torch.float32):
        layers = [nn.Linear(size, 2, bias=False, dtype=dtype) for size in sizes]
        model = nn.Sequential(*layers, nn.GELU())
        model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        memtl.apply(model, memtl.LowBitConfig())
        return model

    model = network(2, 2, 2, 2, 2)
    memtl.save(model, tmp_path)
    own = network(2, 2, 2, 2, 2)
    memtl.load(own, tmp_path)
    assert_same(own[4].weight, model[4].weight)
    fewer = network(2)
    with pytest.raises(ValueError, match=r"has '1.weight', '2.weight', '3.weight', 1 more, which"):
        memtl.load(fewer, tmp_path)
    with pytest.raises(ValueError, match=r"lacks '5.weight', '6.weight'$"):
        memtl.load(network(*[2] * 7), tmp_path)
    wrong = network(3, 2, 3, 3, 3)
    before = wrong[1].weight.detach().clone()
    match = r"'0.weight' is \[2, 2\] torch.float32, but .* \[2, 3\].*'2.w.*'3.w.*, 1 more$"
    with pytest.raises(ValueError, match=match):
        memtl.load(wrong, tmp_path)
    assert_same(wrong[1].weight, before)  # nothing was copied
    own.steps = own.steps.int()
    with pytest.raises(ValueError, match=r"'steps' is \[1\] torch.int64, but .* torch.int32"):
        memtl.load(own, tmp_path)
    half = network(2, 2, 2, 2, 2, dtype=torch.bfloat16)
    memtl.load(half, tmp_path)
    assert_same(half[0].weight, model[0].weight.bfloat16())


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
