"""What every method has in common that trains a small part of a model."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn

import memtl
from memtl import AdaptFormerConfig, Head2ToeConfig, LinearProbeConfig, VPTConfig, VQTConfig
from memtl.methods.base.config import config_from_dict
from memtl.methods.base.transfer import owned
from tests.helpers import assert_same
from tests.methods.models import (
    CLASSES,
    DEPTH,
    NAMES,
    WIDTH,
    assert_close,
    build,
    gradients,
    head_of,
    images,
    logits,
    trained,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")

LINEAR = {"weight", "bias"}
CONFIGS = {
    "linear_probe": LinearProbeConfig(),
    "head2toe": Head2ToeConfig(pool=3),
    "vpt": VPTConfig(num_prompts=3),
    "vpt_shallow": VPTConfig(num_prompts=3, deep=False),
    "adaptformer": AdaptFormerConfig(bottleneck=32),
    "vqt": VQTConfig(num_queries=3),
}
OF_BLOCKS = [name for name in CONFIGS if name != "linear_probe"]
RELATIVE = ("beit_base_patch16_224", "vit_relpos_small_patch16_224")


def parts(name, head="head", blocks="blocks"):
    """Names of what the method trains in a model."""
    own = {f"{head}.{n}" for n in LINEAR}
    if name in ("head2toe", "vqt"):
        own = {f"{head}.linear.{n}" for n in LINEAR}
    if name == "vqt":
        own.add(f"{head}.queries")
    if name.startswith("vpt"):
        own.add("vpt.prompts")
    if name == "adaptformer":
        own |= {f"{blocks}.{m}.adapter.{layer}.{n}" for m in range(DEPTH) for n in LINEAR
                for layer in ("down", "up")}  # fmt: skip
    return own


def applied(name, model=None):
    model = build() if model is None else model
    memtl.apply(model, CONFIGS[name])
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "adapter.up" in n:  # zero at first, and then nothing reaches what is before it
                p.normal_()
    return model


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_trains_is_what_has_to_be_saved(name, model):
    if name.startswith("vpt") and model in RELATIVE:
        pytest.skip("refused")
    head, blocks = {
        "ViT": ("classifier", "vit.layers"),
        "Dinov2": ("classifier", "dinov2.encoder.layer"),
    }.get(model, ("head", "blocks"))
    model = build(model)
    keys = set(model.state_dict())
    report = memtl.apply(model, CONFIGS[name])
    applied_ = parts(name, head, blocks)
    assert trained(model) == set(owned(model)) == applied_
    kept = {k for k in keys if not k.startswith(f"{head}.")}
    assert set(model.state_dict()) == kept | applied_
    assert {n for n, _ in report.parameters} == applied_
    assert report.count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {report.count:,} || all params: {report.total:,}" in str(report)
    assert set(gradients(model.train(), images())) == applied_


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_classifier(name):
    model = build()
    memtl.apply(model, type(CONFIGS[name])(num_classes=9))
    assert logits(model, images()).shape == (2, 9)
    assert model.num_classes == 9
    for model in (build(num_classes=0), build("Dinov2", num_labels=0)):
        before = trained(model)
        with pytest.raises(ValueError, match="num_classes must be given"):
            memtl.apply(model, CONFIGS[name])
        assert trained(model) == before
    model = build(num_classes=0)
    memtl.apply(model, type(CONFIGS[name])(num_classes=9))
    assert logits(model, images()).shape == (2, 9)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_changes_what_trains_and_nothing_else(name):
    model = applied(name).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    gradients(model, images())
    optimizer.step()
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == parts(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_backbone_stays_in_evaluation_mode(name):
    rates = {"drop_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5, "drop_path_rate": 0.5}
    model = applied(name, build(**rates)).train()
    assert model.training
    training = {n for n, m in model.named_modules() if m.training and n}
    assert training == {n.rpartition(".")[0] for n in parts(name)} | {
        "head", *(f"blocks.{m}.adapter" for m in range(DEPTH) if name == "adaptformer")
    }  # fmt: skip
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0
    x = images()
    expected = logits(model, x)
    assert_same(logits(model, x), expected)
    assert not any(m.training for m in model.eval().modules())
    assert_same(logits(model, x), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "ViT"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_independent(name, model, copied):
    model, x = applied(name, build(model)), images()
    expected = logits(model, x)
    other = copied(model)
    assert_same(logits(other, x), expected)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.normal_()
    assert not torch.equal(logits(other, x), expected)
    assert_same(logits(model, x), expected)
    assert set(gradients(other.train(), x)) == trained(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name, tmp_path):
    model, x = build(), images()
    pretrained = copy.deepcopy(model)
    applied(name, model)
    memtl.save(model, tmp_path)
    memtl.load(pretrained, tmp_path)
    assert_same(logits(pretrained, x), logits(model, x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_json_round_trip(config):
    assert type(config).from_json(config.to_json()) == config
    assert config_from_dict(json.loads(config.to_json())) == config
    with pytest.raises(ValueError, match="unknown fields"):
        config_from_dict({"method": config.method, "prompt": 1})


@pytest.mark.parametrize("second", CONFIGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_method_is_refused_and_changes_nothing(name, second):
    model, x = applied(name), images()
    expected = logits(model, x)
    with pytest.raises(ValueError, match="applied already|expected a linear classifier, but head"):
        memtl.apply(model, CONFIGS[second])
    assert trained(model) == parts(name)
    assert_same(logits(model, x), expected)
    filled_in = dataclasses.replace(CONFIGS[name], num_classes=5)
    assert memtl.methods.applied(model) == (filled_in,)


@pytest.mark.parametrize("name", OF_BLOCKS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", "has no attention blocks"),
        ("cait_xxs24_224", "has no attention blocks"),
        ("swin_tiny_patch4_window7_224", "lists of attention blocks"),
        ("deit_tiny_distilled_patch16_224", "has 2 classifiers"),
    ],
)
def test_models_without_one_list_of_attention_blocks(name, model, message):
    import timm

    model = timm.create_model(model)
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        memtl.apply(model, CONFIGS[name])
    assert trained(model) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_no_module(name):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        memtl.apply("vit", CONFIGS[name])


@pytest.mark.parametrize(
    ("make", "fields", "error"),
    [
        (LinearProbeConfig, {"num_classes": 0}, ValueError),
        (LinearProbeConfig, {"num_classes": 2.0}, TypeError),
        (Head2ToeConfig, {"pool": 0}, ValueError),
        (Head2ToeConfig, {"pool": True}, TypeError),
        (Head2ToeConfig, {"normalize": 1}, TypeError),
        (Head2ToeConfig, {"selected": 0}, ValueError),
        (VPTConfig, {"num_prompts": 0}, ValueError),
        (VPTConfig, {"num_prompts": "5"}, TypeError),
        (VPTConfig, {"deep": 1}, TypeError),
        (VPTConfig, {"dropout": 1}, ValueError),
        (AdaptFormerConfig, {"bottleneck": -1}, ValueError),
        (AdaptFormerConfig, {"bottleneck": None}, TypeError),
        (AdaptFormerConfig, {"scale": 0}, ValueError),
        (AdaptFormerConfig, {"scale": float("nan")}, ValueError),
        (AdaptFormerConfig, {"scale": "0.1"}, TypeError),
        (AdaptFormerConfig, {"dropout": -0.1}, ValueError),
    ],
)
def test_fields(make, fields, error):
    (name,) = fields
    with pytest.raises(error, match=f"{name} must be"):
        make(**fields)


@pytest.mark.parametrize("name", CONFIGS)
def test_under_autocast_and_in_bfloat16(name):
    model, x = applied(name), images()
    expected = logits(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(logits(model, x).float(), expected, tolerance=0.05)
        found = gradients(model, x)
    assert {g.dtype for g in found.values()} == {torch.float32}
    model = build().to(torch.bfloat16)
    memtl.apply(model, CONFIGS[name])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {g.dtype for g in gradients(model, x.bfloat16()).values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_under_compile(name):
    torch._dynamo.reset()
    model, x = applied(name), images()
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, x), logits(model, x))
    for key, grad in gradients(compiled, x).items():
        assert_close(grad, expected[key.removeprefix("_orig_mod.")])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vpt", "vpt_shallow", "adaptformer"])
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "ViT"])
def test_what_sends_gradients_through_the_model_may_be_checkpointed(name, model):
    model, x = applied(name, build(model)), images()
    expected = gradients(model, x)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    for key, grad in gradients(model, x).items():
        assert_close(grad, expected[key])


@pytest.mark.parametrize(
    "config", [memtl.BackRazorConfig(), memtl.LowBitConfig()], ids=["br", "lb"]
)
@pytest.mark.parametrize("name", ["vpt", "vpt_shallow", "adaptformer"])
def test_a_conversion_before_keeps_less(name, config):
    model, x = build(), images(4)
    plain = applied(name, copy.deepcopy(model))
    expected, stock = logits(plain, x), memtl.memory.saved_bytes(lambda: plain(x))
    memtl.apply(model, config)
    applied(name, model)
    model.load_state_dict(plain.state_dict())
    assert_close(logits(model, x), expected)
    assert memtl.memory.saved_bytes(lambda: model(x)) < stock
    found = gradients(model, x)
    assert set(found) == parts(name)
    assert all(g.abs().sum() > 0 for g in found.values())
    with pytest.raises(ValueError, match="changed by a method after the conversion"):
        memtl.unconvert(model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_a_conversion_afterwards_and_back(name, model):
    model, x = applied(name, build(model)), images()
    expected = gradients(model, x)
    memtl.apply(model, memtl.LowBitConfig())
    assert set(gradients(model, x)) == parts(name)
    memtl.unconvert(model)
    for key, grad in gradients(model, x).items():
        assert_same(grad, expected[key])


# --- the linear probe


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ViT"])
def test_a_probe_leaves_the_model_and_keeps_its_feature_alone(name):
    model, x = build(name), images()
    expected, weight = logits(model, x), head_of(model).weight
    memtl.apply(model, LinearProbeConfig())
    assert head_of(model).weight is weight
    assert_same(logits(model, x), expected)
    assert memtl.memory.saved_bytes(lambda: logits(model, x)) == 4 * 2 * WIDTH


def test_a_probe_of_a_network_with_batch_norm():
    import timm

    model = timm.create_model("resnet18")
    report = memtl.apply(model, LinearProbeConfig(num_classes=3))
    assert trained(model) == {"fc.weight", "fc.bias"}
    assert report.count == 3 * 512 + 3
    model.train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert model(images()).shape == (2, 3)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_probe_of_what_has_no_linear_classifier():
    with pytest.raises(ValueError, match="has no classifier"):
        memtl.apply(nn.Sequential(nn.Linear(3, 3)), LinearProbeConfig())
    model = nn.Sequential(nn.Linear(3, 3))
    model.head = nn.Sequential(nn.Linear(3, CLASSES))
    with pytest.raises(ValueError, match="expected a linear classifier, but head is .*Sequential"):
        memtl.apply(model, LinearProbeConfig(num_classes=3))  # its own would train, as it is
    model.head = nn.Identity()
    with pytest.raises(ValueError, match="cannot tell how many features head"):
        memtl.apply(model, LinearProbeConfig(num_classes=3))
    assert trained(model) == {"0.weight", "0.bias"}
