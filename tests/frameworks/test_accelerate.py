"""accelerate, in one process; under its launcher in two."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memtl
from memtl.memory import SavedTensors, saved_bytes
from tests.frameworks.small import FEW, assert_as, assert_gradients, images, loss_of, vit, weights


@pytest.fixture(autouse=True)
def fresh():
    """accelerate keeps what it was told first for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerator(**options):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **options)


def prepared(config, after=False, **options):
    """accelerator, model, optimizer and data; converted before or after they are prepared."""
    it, model = accelerator(**options), vit()
    if config is not None and not after:
        memtl.apply(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loader = DataLoader(TensorDataset(*images()), batch_size=1)
    model, optimizer, loader = it.prepare(model, optimizer, loader)
    if config is not None and after:
        memtl.apply(model, config)
    return it, model, optimizer, loader


def train(it, model, optimizer, loader):
    for x, y in loader:
        with it.accumulate(model):
            with SavedTensors(model) as saved:
                loss = loss_of(model, x, y)
            it.backward(loss)
            assert_gradients(model)
            if it.sync_gradients:
                it.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return saved.bytes


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_trains_as_stock_and_keeps_less(options):
    options = OPTIONS[options]
    stock = prepared(None, **options)
    kept = train(*stock)
    for after in (False, True):
        exact = prepared(memtl.FrozenConfig(), after, **options)
        train(*exact)
        assert_as(weights(exact[1]), weights(stock[1]))
        for config in FEW.values():
            assert kept >= 5 * train(*prepared(config, after, **options))


def test_state_is_saved_and_loaded(tmp_path):
    first = prepared(FEW["LowBit"])
    train(*first)
    first[0].save_state(tmp_path)
    train(*first)
    second = prepared(FEW["LowBit"])
    second[0].load_state(tmp_path)
    train(*second)
    assert_as(weights(second[1]), weights(first[1]))


class OwnCode(nn.Module):
    """A model whose own forward calls what memtl serves."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return self.last(F.gelu(self.first(x)))


def test_a_forward_that_was_replaced_is_told():
    """Mixed precision replaces the forward of the model's instance, which its class's cannot pass
    any more."""
    x = torch.randn(8, 64)
    late = accelerator(mixed_precision="bf16").prepare_model(OwnCode())
    report = memtl.apply(late, FEW["LowBit"])
    assert [row.name for row in report.converted] == ["first", "last"]
    assert [row.name for row in report.skipped] == [""]
    assert "was replaced on the instance" in report.skipped[0].reason
    with pytest.raises(ValueError, match="nothing to convert"):
        memtl.apply(
            accelerator(mixed_precision="bf16").prepare_model(nn.Linear(64, 3)), FEW["LowBit"]
        )

    it = accelerator(mixed_precision="bf16")
    model = OwnCode()
    memtl.apply(model, FEW["LowBit"])
    model = it.prepare_model(model)
    kept = saved_bytes(model, x)
    assert kept < saved_bytes(late, x)
    with pytest.raises(ValueError, match="was replaced on the instance"):
        memtl.unconvert(model)
    assert saved_bytes(model, x) == kept
    model = it.unwrap_model(model, keep_fp32_wrapper=False)
    assert memtl.unconvert(model) == 3
    assert saved_bytes(model, x) == saved_bytes(OwnCode(), x)


@pytest.mark.parametrize("first", ["memtl", "hooks"])
def test_hooks_as_of_a_device_map(first):
    """They put a forward in front of every layer's."""
    x, model = torch.randn(8, 64), OwnCode()
    plain = copy.deepcopy(model)
    memtl.apply(plain, FEW["LowBit"])

    def hook():
        for module in model.modules():
            add_hook_to_module(module, ModelHook())

    if first == "memtl":
        memtl.apply(model, FEW["LowBit"])
        hook()
    else:
        hook()
        memtl.apply(model, FEW["LowBit"])
    assert saved_bytes(model, x) == saved_bytes(plain, x)
    model(x).sum().backward()
    plain(x).sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    memtl.unconvert(model)
    assert saved_bytes(model, x) == saved_bytes(OwnCode(), x)
    for module in model.modules():
        remove_hook_from_module(module)
    assert saved_bytes(model, x) == saved_bytes(OwnCode(), x)
