"""Predictions, against the same step with tensors that have data."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl.estimate import Step, optimizer, predict
from memtl.estimate.live import Live
from memtl.estimate.step import trainable
from memtl.estimate.ways import WAYS

TEXT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 101}  # fmt: skip
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 101}
MODELS = {
    "vit_tiny_patch16_224": {"size": 64, "options": {"depth": 2}},
    "resnet18": {"size": 64},
    "mobilenetv2_035": {"size": 64},
    "convnext_atto": {"size": 64},
    "hf:bert": {"tokens": 17, "options": TEXT},
    "hf:gpt2": {"tokens": 17, "options": GPT2},
}


def with_data(step, change, batch_size, autocast=None):
    """Saved bytes and the most that is alive, of a real step."""
    torch.manual_seed(0)
    model = step.build()
    change(model)
    model.train()
    parameters = trainable(model)
    taken = optimizer("adamw", parameters)
    batch = step.batch(model, batch_size, "cpu")
    step.losses(model, batch, autocast).backward()
    taken.step()
    taken.zero_grad()
    saved = memtl.memory.saved_bytes(step.losses, model, batch, autocast)
    state = [t for one in taken.state.values() for t in one.values()]
    with Live([*model.parameters(), *model.buffers(), *state, *batch]) as live:
        step.losses(model, batch, autocast).backward()
        taken.step()
    return saved, live.peak


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("vit_tiny_patch16_224", "stock"),
        ("vit_tiny_patch16_224", "back-razor"),
        ("resnet18", "checkpointing"),
        ("mobilenetv2_035", "low-bit"),
        ("convnext_atto", "stock"),
        ("hf:bert", "back-razor"),
        ("hf:bert", "checkpointing"),
        ("vit_tiny_patch16_224", "blocks"),
        ("hf:bert", "blocks"),
        ("resnet18", "blocks"),
        ("hf:gpt2", "low-bit"),
    ],
)
def test_it_is_what_a_step_with_data_needs(name, way):
    pytest.importorskip("transformers" if name.startswith("hf:") else "timm")
    step = Step.of(name, num_classes=7, **MODELS[name])

    def change(model):
        WAYS[way].change(model, step)

    found = predict(step, change, batch_size=3)
    saved, peak = with_data(step, change, 3)
    # GPT-2's mask, which transformers makes where it cannot see that nothing is packed.
    assert 0 <= found.saved - saved <= (3 * 17 * 17 if name == "hf:gpt2" else 0)
    assert found.saved == sum(found.by_layer.values())
    assert found.peak == pytest.approx(peak, rel=0.02)
    model = step.build()
    assert found.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found.gradients == 4 * found.trainable
    assert found.optimizer == pytest.approx(2 * found.gradients, rel=0.02)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("vit_tiny_patch16_224", "lora"),
        ("vit_tiny_patch16_224", "lora-frozen"),
        ("vit_tiny_patch16_224", "vqt"),
        ("mobilenetv2_035", "rep-net"),
        ("mobilenetv2_035", "bitfit"),
        ("resnet18", "last-layer"),
        ("hf:gpt2", "lora"),
    ],
)
def test_ways_that_train_a_part(name, way):
    pytest.importorskip("transformers" if name.startswith("hf:") else "timm")
    if "lora" in way:
        pytest.importorskip("peft")
    step = Step.of(name, num_classes=7, **MODELS[name])

    def change(model):
        WAYS[way].change(model, step)

    found = predict(step, change, batch_size=3)
    saved, peak = with_data(step, change, 3)
    assert found.saved == saved
    assert found.peak == pytest.approx(peak, rel=0.02)
    assert found.gradients == 4 * found.trainable < found.weights / 2


def small(width=64):
    def batch(model, samples, device):
        labels = torch.zeros(samples, dtype=torch.long, device=device)
        return torch.randn(samples, width, device=device), labels

    def build():
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))

    return Step(build, batch)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_step_of_ones_own(autocast):
    step = small()
    for method in (None, memtl.LowBitConfig(bits=4)):
        found = predict(step, method, batch_size=100, autocast=autocast)
        saved, peak = with_data(
            step, lambda m, method=method: method and memtl.apply(m, method), 100, autocast
        )
        assert found.saved == saved
        assert found.saved_per_sample == saved / 100
        assert found.peak == pytest.approx(peak, rel=0.02)


def test_optimizers():
    weights = predict(small(), batch_size=1).gradients
    states = {
        name: predict(small(), optimizer=name, batch_size=1).optimizer for name in ("sgd", "adamw")
    }
    assert states["sgd"] == 0
    assert 2 * weights < states["adamw"] < 2.01 * weights
    assert predict(small(), optimizer="sgd-momentum", batch_size=1).optimizer == weights
    assert 0 < predict(small(), optimizer="adafactor", batch_size=1).optimizer < weights


def test_several_configurations():
    pytest.importorskip("timm")
    biases = memtl.BitFitConfig(num_classes=7, convert=False)
    step = Step.of("resnet18", num_classes=7, size=64)
    one = predict(step, biases, batch_size=8)
    two = predict(step, [biases, memtl.FrozenConfig()], batch_size=8)
    assert two.trainable == one.trainable
    assert 5 * two.saved < one.saved


def test_a_language_model_of_seven_billion_parameters():
    pytest.importorskip("transformers")
    options = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
               "num_attention_heads": 32, "vocab_size": 32000}  # fmt: skip
    step = Step.of("hf:llama", tokens=16, language=True, options=options)
    found = predict(step, batch_size=1, optimizer="sgd")
    assert 6.7e9 < found.trainable < 6.8e9
    assert found.peak > found.weights + found.gradients > 5e10


def reads_numbers(model, inputs, labels):
    out = model(inputs)
    return out[out.sum(1) > 0].sum() if out.sum().item() > 0 else F.cross_entropy(out, labels)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (("nope",), {}, ValueError, "timm has no model 'nope'"),
        ((3,), {}, TypeError, "must be a str, got int"),
        (("resnet18",), {"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        (("resnet18",), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (("resnet18",), {"batch_size": 1.5}, TypeError, "batch_size must be an int, got float"),
        (("resnet18",), {"language": True}, ValueError, "it is no language model"),
        (("resnet18", 3), {}, TypeError, "method must be a Config, several, or callable, got 3"),
        ((small(),), {"optimizer": "best"}, ValueError, "optimizer must be one of adamw"),
        ((small(),), {"device": "tpu"}, ValueError, "device must be cpu or cuda, got 'tpu'"),
        ((small(),), {"autocast": torch.int8}, ValueError, "autocast must be None, bfloat16"),
        ((small(),), {"size": 3}, TypeError, "a Step has its options already, got size"),
        (
            (small(), lambda model: model.requires_grad_(False)),
            {},
            ValueError,
            "nothing trains",
        ),
        (
            (dataclasses.replace(small(), loss=reads_numbers),),
            {},
            ValueError,
            "cannot be predicted without data: it goes by numbers in a tensor",
        ),
        (
            (dataclasses.replace(small(), build=lambda: nn.Linear(5, 3)),),
            {},
            ValueError,
            "the model cannot take this step: ",
        ),
        ((dataclasses.replace(small(), build=lambda: 3),), {}, TypeError, "must give a module"),
    ],
)
def test_it_says_what_is_wrong(arguments, options, error, said):
    pytest.importorskip("timm")
    with pytest.raises(error, match=said.replace("(", r"\(")):
        predict(*arguments, **options)
