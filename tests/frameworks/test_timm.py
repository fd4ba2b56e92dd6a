"""A loop as timm's training script has it."""

from __future__ import annotations

import contextlib

import numpy
import pytest
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler

import memtl
from memtl.memory import SavedTensors
from tests.frameworks.small import FEW, assert_as, assert_gradients, images, vit, weights


def train(config=None, autocast=False, steps=3):
    """The weights, those of their average, and the bytes that a step keeps."""
    model = vit()
    if config is not None:
        memtl.apply(model, config)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75
    )
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=steps, warmup_epochs=1)
    average = ModelEmaV3(model, decay=0.5)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
    scaler, loss_of = NativeScaler(device="cpu"), SoftTargetCrossEntropy()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    x, y = images()
    model.train()
    for step in range(steps):
        mixed, targets = mixup(x.clone(), y)
        with context, SavedTensors(model) as saved:
            loss = loss_of(model(mixed).float(), targets)
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        assert_gradients(model)
        optimizer.zero_grad()
        average.update(model, step=step)
        schedule.step(step + 1)
    assert type(average.module) is type(model)
    return weights(model), weights(average.module), saved.bytes


@pytest.mark.parametrize("autocast", [False, True])
def test_trains_as_stock_and_keeps_less(autocast):
    def seeded(config=None):
        numpy.random.seed(0)  # mixup's
        return train(config, autocast)

    *stock, kept = seeded()
    *exact, _ = seeded(memtl.FrozenConfig())
    for a, b in zip(exact, stock, strict=True):
        assert_as(a, b)
    for config in FEW.values():
        assert kept >= 5 * seeded(config)[-1]
