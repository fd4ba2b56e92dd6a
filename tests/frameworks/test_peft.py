"""peft's adapters, put in before and after a conversion."""

from __future__ import annotations

import peft
import pytest
import torch

import memtl
from memtl.memory import saved_bytes
from tests.frameworks.small import FEW, ROUNDING, assert_as, images, lora, train, vit, weights

X, Y = images()


def converted(config, model):
    memtl.apply(model, config)
    return model


@pytest.mark.parametrize("first", ["peft", "memtl"])
def test_lora_trains_as_stock(first):
    stock, exact = lora(vit()), memtl.FrozenConfig()
    model = converted(exact, lora(vit())) if first == "peft" else lora(converted(exact, vit()))
    for either in (stock, model):
        train(either, X, Y)
    assert_as(weights(model), weights(stock))


@pytest.mark.parametrize("method", FEW)
def test_lora_keeps_less(method):
    stock = saved_bytes(lora(vit()), X)
    model = converted(FEW[method], lora(vit()))
    assert stock >= 5 * train(model, X, Y)
    # Layers that peft makes afterwards are its own, and keep their input whole.
    later = lora(converted(FEW[method], vit()))
    assert saved_bytes(model, X) < train(later, X, Y) < stock / 2


@pytest.mark.parametrize("first", ["peft", "memtl"])
@pytest.mark.parametrize("method", FEW)
def test_an_adapter_is_switched_off_merged_saved_and_loaded(method, first, tmp_path):
    config = FEW[method]
    if first == "peft":
        model = converted(config, lora(vit()))
    else:
        model = lora(converted(config, vit()))
    train(model, X, Y)
    with torch.no_grad():
        adapted = model(X)
        with model.disable_adapter():
            assert not torch.allclose(model(X), adapted)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(converted(config, vit()), tmp_path)
    assert_as({"y": again(X).detach()}, {"y": adapted}, ROUNDING)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == vit().state_dict().keys()
    assert_as({"y": merged(X).detach()}, {"y": adapted}, 10 * ROUNDING)
    assert saved_bytes(merged.requires_grad_(True), X) < saved_bytes(vit(), X) / 5
    assert memtl.unconvert(merged) and type(merged.blocks[0].mlp.fc1) is torch.nn.Linear


ADAPTERS = {
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], use_dora=True),
    "rsLoRA": lambda: peft.LoraConfig(r=4, target_modules=["qkv"], use_rslora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["qkv"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["proj"]),
    "convolution": lambda: peft.LoraConfig(r=4, target_modules=["patch_embed.proj"]),
}


@pytest.mark.parametrize("first", ["peft", "memtl"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_other_adapters_train_as_stock(name, first):
    def build(model):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, ADAPTERS[name]())
        for parameter in adapted.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return adapted

    exact, stock = memtl.FrozenConfig(), build(vit())
    model = converted(exact, build(vit())) if first == "peft" else build(converted(exact, vit()))
    for either in (stock, model):
        train(either, X, Y)
    assert_as(weights(model), weights(stock), ROUNDING)
    train(converted(FEW["Back Razor"], build(vit())), X, Y)
