"""Biases, or norms, and the classifier train; what that keeps; the options of every such method."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl import BitFitConfig, FrozenConfig, NormTuningConfig, RepNetConfig, memory
from memtl.methods import applied
from memtl.nn.layers import Layer
from tests.helpers import assert_same
from tests.methods import models as transformers_and_vits
from tests.methods.convnets import NAMES, SIZE, build, images
from tests.methods.models import assert_close, gradients, trained

pytest.importorskip("timm")

CONFIGS = {"bitfit": BitFitConfig, "norm_tuning": NormTuningConfig}
both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def test_what_trains():
    model = build("resnet18")
    memtl.apply(model, BitFitConfig())
    own = {"fc.weight", "fc.bias"}
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert trained(model) == own | biases and "layer4.1.bn2.bias" in biases
    model = build("resnet18")
    memtl.apply(model, NormTuningConfig())
    assert trained(model) == own | biases | {b.replace("bias", "weight") for b in biases}


def test_a_biass_name_may_say_more():
    model = transformers_and_vits.build("beit_base_patch16_224")
    memtl.apply(model, BitFitConfig())
    assert {"blocks.0.attn.q_bias", "blocks.1.mlp.fc2.bias", "norm.bias"} & set(
        dict(model.named_parameters())
    ) <= trained(model)
    assert "blocks.0.attn.q_bias" in trained(model)
    assert "blocks.0.attn.relative_position_bias_table" not in trained(model)


@both
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ViT"])
def test_transformers_too(config, name):
    model = transformers_and_vits.build(name)
    x = transformers_and_vits.images()
    stock = transformers_and_vits.build(name)
    stock.load_state_dict(model.state_dict())
    memtl.apply(model, config())
    memtl.apply(stock, config(convert=False))
    expected = gradients(stock.train(), x)
    found = gradients(model.train(), x)
    assert found.keys() == expected.keys() == trained(model)
    for key, gradient in found.items():
        if not key.endswith("k_proj.bias"):  # softmax does not see it: 0, but for rounding
            assert_close(gradient, expected[key], 1e-5)


@both
@pytest.mark.parametrize("name", NAMES)
def test_the_forward_is_the_models_own(name, config):
    model, x = build(name), images()
    expected = model(x).detach()
    memtl.apply(model, config())
    assert_same(model.train()(x).detach(), expected)  # its batch norms do not follow the batch


@both
@pytest.mark.parametrize("name", ["mobilenetv2_035", "efficientnet_b0", "convnext_atto"])
def test_gradients_are_those_of_pytorch(name, config):
    x = images().double()
    stock, model = (build(name).double() for _ in range(2))
    model.load_state_dict(stock.state_dict())
    memtl.apply(stock, config(convert=False))
    memtl.apply(model, config())
    saved = {}
    for kind, m in (("stock", stock), ("ours", model)):
        with memory.SavedTensors(m.train()) as tensors:
            m(x)
        saved[kind] = tensors.bytes
    expected, found = gradients(stock, x), gradients(model, x)
    assert found.keys() == expected.keys() == trained(model)
    for key, gradient in found.items():
        assert_close(gradient, expected[key], 1e-9)
    assert saved["ours"] < 0.7 * saved["stock"]


def test_bitfit_keeps_bits():
    model = build("mobilenetv2_035")
    memtl.apply(model, BitFitConfig())
    elements = 0

    def count(module, args, output):
        nonlocal elements
        elements += -(-output.numel() // 8)

    acts = [m for m in model.modules() if isinstance(m, nn.ReLU6)]
    handles = [m.register_forward_hook(count) for m in acts]
    with memory.SavedTensors(model) as tensors:
        model.train()(images())
    for handle in handles:
        handle.remove()
    feature = 4 * 2 * model.classifier.in_features
    assert tensors.bytes == elements + feature


def test_norms_in_eight_bits():
    x, saved = images(), {}
    for key, config in (("exact", None), ("8 bits", FrozenConfig(norm=8))):
        torch.manual_seed(3)
        model = build()
        if config is not None:
            memtl.apply(model, config)
        memtl.apply(model, NormTuningConfig())
        with memory.SavedTensors(model) as tensors:
            model(x)
        saved[key] = tensors.bytes, gradients(model, x)
    assert saved["8 bits"][0] < 0.45 * saved["exact"][0]
    for name, exact in saved["exact"][1].items():
        assert F.cosine_similarity(saved["8 bits"][1][name].ravel(), exact.ravel(), 0) > 0.99


@both
def test_a_model_without_any_is_refused_and_left_alone(config):
    model = nn.Sequential()
    model.body = nn.Conv2d(3, 4, 3, bias=False)
    model.classifier = nn.Linear(4, 2)
    what = "no biases but its classifier's" if config is BitFitConfig else "no norm with parameters"
    with pytest.raises(ValueError, match=what):
        memtl.apply(model, config())
    assert all(p.requires_grad for p in model.parameters()) and applied(model) == ()
    with pytest.raises(ValueError, match="has no classifier"):
        memtl.apply(nn.Linear(2, 2), config())
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got int"):
        memtl.apply(3, config())


def test_a_classifier_of_another_kind():
    model = build("resnet18")
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 3))
    kept = model.fc
    report = memtl.apply(model, BitFitConfig())  # its own trains, whatever it is
    assert model.fc is kept and "fc.0.weight" in dict(report.parameters)
    assert applied(model) == (BitFitConfig(),)
    model = build("resnet18")
    model.fc = nn.Sequential(nn.Linear(512, 3))
    with pytest.raises(ValueError, match="expected a linear classifier, but fc is .*Sequential"):
        memtl.apply(model, BitFitConfig(num_classes=4))
    assert all(p.requires_grad for p in model.parameters())
    model = build("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="num_classes must be given"):
        memtl.apply(model, BitFitConfig())
    memtl.apply(model, BitFitConfig(num_classes=4))
    assert model(images()).shape == (2, 4) and applied(model)[0].num_classes == 4


@pytest.mark.parametrize("config", [*CONFIGS.values(), RepNetConfig])
def test_weights_in_eight_bits(config, tmp_path):
    torch.manual_seed(1)
    fields = {"image_size": SIZE} if config is RepNetConfig else {}
    exact, x = build(), images()
    before = {n: p.numel() for n, p in exact.named_parameters()}
    model = build()
    model.load_state_dict(exact.state_dict())
    memtl.apply(model, config(weight_bits=8, **fields))
    weights = dict(model.named_parameters())
    gone = before.keys() - weights.keys()
    assert "conv_stem.weight" in gone and "classifier.weight" not in gone
    assert all(n.endswith("weight") and n in model.state_dict() for n in gone)
    assert_close(model.eval()(x), exact(x), 0.2)
    assert not torch.equal(model(x), exact(x))
    with memory.SavedTensors(model.train()) as tensors:
        model(x).sum().backward()
    plain = build()
    memtl.apply(plain, config(**fields))
    with memory.SavedTensors(plain.train()) as other:
        plain(x)
    assert tensors.bytes == other.bytes  # decoded weights are not kept
    memtl.save(model.eval(), tmp_path)
    again = build()
    again.load_state_dict(exact.state_dict())
    memtl.load(again, tmp_path)
    assert_same(again.eval()(x), model(x))


@both
def test_what_is_converted_already_stays(config):
    model = build()
    memtl.apply(model, memtl.LowBitConfig(bits=8))
    memtl.apply(model, config())
    kinds = [c.method for c in applied(model)]
    assert kinds == ["low_bit", config.method]
    model = build()
    memtl.apply(model, config(convert=False))
    assert not any(isinstance(m, Layer) for m in model.modules())
    memtl.apply(model, FrozenConfig())
    assert sum(isinstance(m, Layer) for m in model.modules()) > 50


@pytest.mark.parametrize("config", [*CONFIGS.values(), RepNetConfig, memtl.LiteResidualConfig])
def test_json(config):
    made = config(num_classes=7, weight_bits=8, convert=False)
    assert memtl.methods.Config.from_json(made.to_json()) == made
    assert dataclasses.replace(made, convert=True) != made


def test_a_classifier_that_peft_wrapped_is_refused():
    peft = pytest.importorskip("peft")
    model = transformers_and_vits.build()
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="leave it to the method: no modules_to_save"):
        memtl.apply(wrapped, BitFitConfig())


def test_adapters_of_peft_are_not_frozen_in_silence():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        transformers_and_vits.build(), peft.LoraConfig(r=2, target_modules=["qkv"])
    )
    before = trained(wrapped)
    with pytest.raises(ValueError, match="peft trains .*, which this method would freeze"):
        memtl.apply(wrapped, BitFitConfig())
    assert trained(wrapped) == before
    memtl.apply(wrapped, FrozenConfig())
    assert trained(wrapped) == before
