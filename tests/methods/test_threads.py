"""One model called by several threads, and calls that fail: nothing passes from one to another."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import memtl
from tests.helpers import assert_same
from tests.methods.networks import vit

CONFIGS = [
    memtl.VQTConfig(num_queries=2),
    memtl.Head2ToeConfig(),
    memtl.AdaptFormerConfig(bottleneck=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_threads_do_not_meet(config):
    model = vit().eval()
    memtl.apply(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapter.up" in name:
                p.normal_()
    xs = torch.randn(2, 3, 3, 16, 16)
    with torch.no_grad():
        expected = [model(x) for x in xs]
    failures: list[object] = []

    def work(x, y):
        try:
            with torch.no_grad():
                for _ in range(60):
                    if not torch.equal(model(x), y):
                        failures.append("another result")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: config.method)
def test_a_call_that_fails_leaves_the_reader_disarmed(config):
    model = vit().train()
    memtl.apply(model, config)

    def fail(*args):
        raise ZeroDivisionError

    x = torch.randn(2, 3, 16, 16)
    expected = model.eval()(x)
    with model.blocks[1].register_forward_pre_hook(fail), pytest.raises(ZeroDivisionError):
        model(x)
    reader = model.head.reader
    assert not reader.now.armed and not reader.now.gathered
    model.forward_features(x)
    assert not reader.now.gathered
    assert_same(copy.deepcopy(model)(x), expected)


def test_transformers_loss_goes_by_the_new_classes():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    for method in (memtl.VQTConfig, memtl.LinearProbeConfig, memtl.VPTConfig):
        model = transformers.ViTForImageClassification(config)
        memtl.apply(model, method(num_classes=6))
        output = model(torch.randn(4, 3, 16, 16), labels=torch.tensor([0, 5, 2, 1]))
        assert output.logits.shape == (4, 6) and output.loss.isfinite()
        output.loss.backward()
