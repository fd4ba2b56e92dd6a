"""FrozenConfig: whole networks, their gradients beside stock's bit for bit, and what they keep."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, ViTConfig
from transformers import ViTForImageClassification as HuggingFaceViT
from transformers.models.bloom.modeling_bloom import BloomGelu

import memtl
from memtl import FrozenConfig
from memtl.memory import SavedTensors
from memtl.storage import Dense, Quantized
from tests.helpers import assert_same, cosine

CLASSES = 5
BERT = BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    vocab_size=50, num_labels=CLASSES,
)  # fmt: skip
VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    image_size=32, patch_size=8, num_labels=CLASSES,
)  # fmt: skip
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def randomised(model: nn.Module) -> nn.Module:
    """Biases, scales and running statistics that are not all alike; everything frozen."""
    with torch.no_grad():
        for p in model.requires_grad_(False).parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def named(name: str) -> nn.Module:
    """A network, frozen but for what comes first, so that gradients pass through all of it."""
    if name == "bert":
        model = randomised(BertForSequenceClassification(BERT))
        first = model.bert.embeddings.word_embeddings.weight
    elif name == "hf vit":
        model = randomised(HuggingFaceViT(VIT))
        first = model.vit.embeddings.cls_token
    else:
        options = SMALL_VIT if name.startswith("vit") else {}
        model = randomised(timm.create_model(name, num_classes=CLASSES, **options))
        first = next(p for n, p in model.named_parameters() if n.endswith("weight"))
    first.requires_grad_()
    return model


def batch(model: nn.Module) -> torch.Tensor:
    if isinstance(model, BertForSequenceClassification):
        return torch.randint(50, (2, 9))
    return torch.randn(2, 3, 32, 32)


def loss_of(model: nn.Module, x: torch.Tensor, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    out = model(x)
    return F.cross_entropy(getattr(out, "logits", out), torch.tensor([1, 2]))


def measured(model: nn.Module, x: torch.Tensor):
    """(bytes saved, gradients by name, buffers by name) of one step; buffers are put back."""
    before = copy.deepcopy(dict(model.named_buffers()))
    model.zero_grad(set_to_none=True)
    with SavedTensors(model) as saved:
        loss = loss_of(model, x)
    kept = saved.bytes
    del saved
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    after = copy.deepcopy(dict(model.named_buffers()))
    with torch.no_grad():
        for n, b in model.named_buffers():
            b.copy_(before[n])
    return kept, grads, after


def assert_same_step(ours, stock) -> None:
    assert stock[1]
    for a, b in zip(ours[1:], stock[1:], strict=True):
        assert a.keys() == b.keys()
        for n in b:
            assert_same(a[n], b[n])


# name -> how many times fewer bytes at least, in evaluation and in training.
NETWORKS = {
    "mobilenetv2_050": (20, 2),
    "mobilenetv3_small_050": (3, 2),
    "efficientnet_b0": (3, 2.5),
    "resnet18": (8, 1.5),
    "convnext_atto": (1.8, 1.8),
    "vit_tiny_patch16_224": (1.05, 1.05),
    "bert": (1.1, 1.1),  # so small a map's dropout costs less than a generator's state
    "hf vit": (1.1, 1.1),
}


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_a_network_are_stock_bit_for_bit(name, train):
    model = named(name).train(train)
    x = batch(model)
    stock = measured(model, x)
    memtl.apply(model, FrozenConfig())
    ours = measured(model, x)
    assert_same_step(ours, stock)
    assert ours[0] * NETWORKS[name][train] < stock[0]
    memtl.unconvert(model)
    again = measured(model, x)
    assert again[0] == stock[0]
    assert_same_step(again, stock)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet10t", "ghostnet_050"])
def test_gradients_in_channels_last_are_stock_bit_for_bit(name, train):
    model = named(name).train(train).requires_grad_(True)
    model = model.to(memory_format=torch.channels_last)
    x = batch(model).to(memory_format=torch.channels_last)
    stock = measured(model, x)
    memtl.apply(model, FrozenConfig())
    ours = measured(model, x)
    assert_same_step(ours, stock)
    assert ours[0] < stock[0]


def lora(name: str) -> nn.Module:
    """LoRA in every block, B not zero."""
    if name == "bert":
        model, targets = BertForSequenceClassification(BERT), ["query", "value"]
    elif name == "hf vit":
        model, targets = HuggingFaceViT(VIT), r".*attention.*(query|key|q_proj|k_proj)"
    else:
        model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **SMALL_VIT)
        targets = ["qkv"]
    randomised(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    for n, p in model.named_parameters():
        p.requires_grad_("lora_" in n)
        if "lora_B" in n:
            nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("name", ["bert", "hf vit", "timm vit"])
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_lora_of_peft(name, train):
    model = lora(name).train(train)
    x = batch(model)
    stock = measured(model, x)
    assert all("lora_" in n for n in stock[1]) and len(stock[1]) >= 4
    memtl.apply(model, FrozenConfig())
    ours = measured(model, x)
    assert_same_step(ours, stock)
    assert ours[0] < 0.9 * stock[0]
    memtl.unconvert(model)
    memtl.apply(model, FrozenConfig(linear=8, attention=8, norm=8, activation=8))
    few = measured(model, x)
    assert few[0] < stock[0] / 2.5
    for n, grad in stock[1].items():
        assert cosine(few[1][n], grad) > 0.99, n


def test_the_module_of_bloom():
    stock = nn.Sequential(nn.Linear(6, 8), BloomGelu(), nn.Linear(8, 3))
    ours = copy.deepcopy(stock)
    memtl.apply(ours, FrozenConfig())
    x = torch.randn(5, 6)
    for model in (stock, ours):
        model(x).square().sum().backward()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert_same(a.grad, b.grad)


# ------------------------------------------------------------------- what changes after conversion


def pair(name: str, train: bool = False) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A stock network, the same one converted, and a batch."""
    stock = named(name).train(train)
    ours = copy.deepcopy(stock)
    memtl.apply(ours, FrozenConfig())
    return stock, ours, batch(stock)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_what_is_thawed_trains_from_the_next_step_on(name, train):
    stock, ours, x = pair(name, train)
    assert_same_step(measured(ours, x), measured(stock, x))
    for model in (stock, ours):
        model.requires_grad_(True)
    kept, *thawed = measured(ours, x)
    stock_kept, *expected = measured(stock, x)
    assert len(thawed[0]) == sum(1 for _ in stock.parameters())
    assert kept < stock_kept
    assert_same_step((kept, *thawed), (stock_kept, *expected))


def test_batch_norm_switched_to_training_and_back():
    stock, ours, x = pair("mobilenetv2_050")
    kept = []
    for train in (False, True, False):
        step, expected = (measured(m.train(train), x) for m in (ours, stock))
        assert_same_step(step, expected)
        kept.append(step[0])
    assert kept[0] == kept[2] < kept[1]


def test_only_batch_norms_in_training():
    """Statistics go on while dropout, say, does not."""
    stock, ours, x = pair("resnet18")
    for model in (stock, ours):
        for module in model.modules():
            module.train(isinstance(module, nn.BatchNorm2d))
    assert_same_step(measured(ours, x), measured(stock, x))


def in_place() -> nn.Sequential:
    def act(kind):
        return kind(inplace=True)

    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act(nn.SiLU),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), act(nn.ReLU),
        nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), act(nn.Hardswish),
        nn.Conv2d(8, 8, 3), act(nn.ELU), nn.Dropout(0.2, inplace=True),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), act(nn.Hardsigmoid),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize("trained", ["the first", "every second", "all"])
def test_activations_in_place(trained):
    stock = randomised(in_place()).train()
    parameters = list(stock.parameters())
    chosen = {"the first": parameters[:1], "every second": parameters[::2], "all": parameters}
    for p in chosen[trained]:
        p.requires_grad_()
    ours = copy.deepcopy(stock)
    memtl.apply(ours, FrozenConfig())
    x = torch.randn(2, 3, 24, 24)
    step, expected = measured(ours, x), measured(stock, x)
    assert_same_step(step, expected)
    assert step[0] < expected[0]


@pytest.mark.parametrize("name", ["convolutions", "vit_tiny_patch16_224"])
def test_compiled_as_one_graph(name):
    torch._dynamo.reset()
    if name == "convolutions":
        stock, x = randomised(in_place()).eval(), torch.randn(2, 3, 24, 24)
        stock[0].requires_grad_()
        ours = copy.deepcopy(stock)
        memtl.apply(ours, FrozenConfig())
    else:
        stock, ours, x = pair(name)
    expected = measured(stock, x)[1]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    loss_of(compiled, x).backward()
    for n, p in ours.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-5)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_checkpointing_and_accumulation(name):
    stock, ours, x = pair(name)
    for model in (stock, ours):
        model.requires_grad_(True)
    for run in (ours, Checkpointed(ours)):
        for model in (stock, ours):
            model.zero_grad()
        for seed in (0, 1):
            loss_of(stock, x + seed).backward()
            loss_of(run, x + seed).backward()
        for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
            assert_same(a.grad, b.grad)


def test_a_second_derivative_is_refused():
    _, ours, x = pair("vit_tiny_patch16_224")
    parameters = [p for p in ours.parameters() if p.requires_grad]
    (grad,) = torch.autograd.grad(loss_of(ours, x), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_behave_alike(way):
    stock, ours, x = pair("mobilenetv3_small_050")
    twin = way(ours)
    first, second = measured(ours, x), measured(twin, x)
    assert first[0] == second[0]
    assert_same_step(second, measured(stock, x))


def test_autocast():
    stock, ours, x = pair("vit_tiny_patch16_224", train=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_of(m, x) for m in (stock, ours)]
    for loss in losses:
        loss.backward()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_same(a.grad, b.grad)


# ---------------------------------------------------------------------------- the configuration


def test_formats():
    assert set(FrozenConfig().formats().values()) == {Dense(rebuild=True)}
    formats = FrozenConfig(attention=8, activation=4).formats()
    assert formats["attention"] == Quantized(8, rebuild=True)
    assert formats["activation"] == Quantized(4)  # of the derivative, in a fixed range
    assert formats["norm"] == Dense(rebuild=True)


@pytest.mark.parametrize("bits", [0, 1, 5, 16, "4", 4.0, True])
def test_bits_that_are_none_are_refused(bits):
    with pytest.raises(ValueError, match=r"norm: bits must be one of \(8, 4, 3, 2\)"):
        FrozenConfig(norm=bits)


def test_patterns_are_checked():
    with pytest.raises(TypeError, match="target_modules must be None, a string or strings"):
        FrozenConfig(target_modules=[1])
    with pytest.raises(ValueError, match="matches no module"):
        memtl.apply(nn.Linear(2, 2), FrozenConfig(target_modules=["blocks"]))


@pytest.mark.parametrize(
    "config",
    [FrozenConfig(), FrozenConfig(linear=8, activation=4, exclude_modules=["head"])],
    ids=["exact", "few bits"],
)
def test_json_round_trip(config):
    assert FrozenConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["method"] == "frozen"
    with pytest.raises(ValueError, match="unknown fields"):
        FrozenConfig.from_json(json.dumps({**json.loads(config.to_json()), "bits": 4}))
