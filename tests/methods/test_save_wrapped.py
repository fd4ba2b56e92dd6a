"""memtl.save and memtl.load through torch.compile, parallel training, sharding and averaging."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import memtl
from memtl.methods import applied
from memtl.methods.base.record import unwrapped
from tests.helpers import ROOT, assert_same
from tests.methods.networks import images, vit

VQT = memtl.VQTConfig(num_queries=2, num_classes=4)


def tuned(config=VQT):
    model = vit()
    memtl.apply(model, config)
    return model


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def lightly(model):
    """torch.compile, by a backend that takes no time."""
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": lightly,
    "data parallel": nn.DataParallel,
    "data parallel, compiled": lambda m: nn.DataParallel(lightly(m)),
    "compiled, data parallel": lambda m: lightly(nn.DataParallel(m)),
    "distributed": DistributedDataParallel,
    "distributed, compiled": lambda m: DistributedDataParallel(lightly(m)),
    "compiled, distributed": lambda m: lightly(DistributedDataParallel(m)),
    "averaged": AveragedModel,
    "averaged, compiled": lambda m: AveragedModel(lightly(m)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_leave_no_prefix(tmp_path, group, wrap):
    model = tuned()
    wrapped = wrap(model)
    assert applied(wrapped) == (VQT,)
    memtl.save(wrapped, tmp_path / "save")
    plain = vit()
    memtl.load(plain, tmp_path / "save")
    assert_same(plain.head.queries, model.head.queries)
    again = wrap(tuned())
    memtl.load(again, tmp_path / "save")
    assert_same(unwrapped(again).head.queries, model.head.queries)


@pytest.mark.parametrize("wrap", [lightly, nn.DataParallel, lambda m: nn.DataParallel(lightly(m))])
def test_loading_into_a_wrapped_model_that_has_no_method(tmp_path, wrap):
    model = tuned()
    memtl.save(model, tmp_path)
    fresh = vit()
    wrapped = wrap(fresh.eval())
    x = images().images
    assert wrapped(x).shape == (12, 5)  # compiled now
    memtl.load(wrapped, tmp_path)
    assert applied(wrapped) == applied(fresh) == (VQT,)
    assert_same(fresh.head.queries, model.head.queries)
    assert wrapped(x).shape == (12, 4)
    assert_same(wrapped(x), fresh(x))


def test_what_parallel_training_would_not_know_of_is_refused(tmp_path, group):
    memtl.save(tuned(), tmp_path / "save")
    for wrap in (DistributedDataParallel, lambda m: lightly(DistributedDataParallel(m))):
        fresh = wrap(vit())
        with pytest.raises(ValueError, match="load first; DistributedDataParallel afterwards"):
            memtl.load(fresh, tmp_path / "save")
        assert applied(fresh) == ()
    with pytest.raises(ValueError, match="load first; DistributedDataParallel afterwards"):
        memtl.apply(DistributedDataParallel(vit()), VQT)


def test_a_conversion_is_remembered_by_the_model_inside(tmp_path, group):
    model = vit()
    wrapped = DistributedDataParallel(model)
    memtl.apply(wrapped, memtl.BackRazorConfig(keep=0.2))
    assert applied(model) == applied(wrapped) == (memtl.BackRazorConfig(keep=0.2),)
    memtl.save(model, tmp_path / "save")
    fresh = vit()
    memtl.load(DistributedDataParallel(fresh), tmp_path / "save")
    assert_same(fresh.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    memtl.unconvert(wrapped)
    assert applied(model) == ()


@pytest.mark.parametrize("wrap", [lightly, checkpoint_wrapper])
def test_wrappers_in_the_middle_of_names(tmp_path, wrap):
    model = tuned(memtl.AdaptFormerConfig(bottleneck=3))
    plain = vit()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    model.blocks[0] = wrap(model.blocks[0])
    model.blocks[2].mlp = wrap(model.blocks[2].mlp)
    assert any("_wrapped_module." in n or "_orig_mod." in n for n, _ in model.named_parameters())
    memtl.save(model, tmp_path)
    memtl.load(plain, tmp_path)
    trained = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    assert [name for name, _ in trained] == names
    own = [p for p in model.parameters() if p.requires_grad]
    for (_, p), expected in zip(trained, own, strict=True):
        assert_same(p, expected)
        nn.init.zeros_(p)
    memtl.save(plain, tmp_path)
    memtl.load(model, tmp_path)
    assert all(not p.any() for p in own)


class Residual(nn.Module):
    """Has layers of the names that wrappers use, and is none."""

    def __init__(self, inside):
        super().__init__()
        self.module = inside
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return self.module(x) + x @ self.weight


def test_a_network_with_a_layer_called_module(tmp_path):
    def network():
        return Residual(nn.Sequential(Residual(nn.Linear(3, 3)), nn.GELU()))

    model = network()
    memtl.apply(model, memtl.BackRazorConfig())
    assert unwrapped(model) is model
    memtl.save(model, tmp_path)
    fresh = network()
    memtl.load(fresh, tmp_path)
    assert applied(fresh) == applied(model)
    for p, own in zip(fresh.parameters(), model.parameters(), strict=True):
        assert_same(p, own)
    x = torch.randn(4, 3)
    assert_same(fresh(x), model(x))


class FullyShardedDataParallel(nn.Module):
    """In the place of torch's, which needs a GPU: recognised by its name."""

    def __init__(self, inside):
        super().__init__()
        self._fsdp_wrapped_module = inside


def test_parts_of_parameters_are_refused(tmp_path):
    model = tuned(memtl.BackRazorConfig())
    memtl.save(model, tmp_path)
    model.head.bias.ds_numel = 5
    for use in (memtl.save, memtl.load):
        with pytest.raises(ValueError, match="DeepSpeed's ZeRO-3 .* gather them first"):
            use(model, tmp_path)
    del model.head.bias.ds_numel
    model.blocks[1] = FullyShardedDataParallel(model.blocks[1])
    for use in (memtl.save, memtl.load):
        with pytest.raises(ValueError, match="FullyShardedDataParallel flattens parameters"):
            use(model, tmp_path)


def test_two_processes_save_sharded_models(tmp_path):
    script = str(ROOT / "tests" / "methods" / "save_process.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, script, str(tmp_path), str(rank)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    fresh = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3))
    memtl.load(fresh, tmp_path / "save")
    for name, t in torch.load(tmp_path / "whole").items():
        assert_same(fresh.state_dict()[name], t)
