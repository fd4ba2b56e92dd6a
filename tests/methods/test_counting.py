"""memtl.trainable_parameters and memtl.print_trainable_parameters."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import memtl
from memtl.memory import MIB, saved_bytes
from memtl.nn import stock
from tests.helpers import assert_same
from tests.methods.networks import images, vit


def test_counts_are_pefts(capsys):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    model.print_trainable_parameters()
    memtl.print_trainable_parameters(model)
    theirs, ours = capsys.readouterr().out.splitlines()
    assert ours == theirs
    assert memtl.trainable_parameters(model) == model.get_nb_trainable_parameters()


def test_a_tensor_of_several_names_counts_once():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(9, 2))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    assert memtl.trainable_parameters(model) == (36 + 18, 36 + 18 + 2)


def test_weights_in_8_bits_count_as_what_they_stand_for():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    memtl.nn.compress_weights(model)
    assert memtl.trainable_parameters(model) == (12, 42 - 30 + 35)


def test_nothing_trains(capsys):
    memtl.print_trainable_parameters(nn.Linear(3, 2).requires_grad_(False))
    memtl.print_trainable_parameters(nn.GELU())
    none = "trainable params: 0 || all params: {} || trainable%: 0.0000\n"
    assert capsys.readouterr().out == none.format(8) + none.format(0)


def line_of(capsys):
    _, line = capsys.readouterr().out.splitlines()
    return line


def test_what_is_kept_is_measured_beside_stock(capsys):
    model = vit(depth=8, embed_dim=64)
    x = images(8).images
    expected = saved_bytes(model, x) / 8 / MIB
    memtl.print_trainable_parameters(model, x)
    assert line_of(capsys) == f"saved for backward: {expected:.2f} MiB a sample (batch 8)"
    memtl.apply(model, memtl.BackRazorConfig())
    classes = [type(module) for module in model.modules()]
    kept = saved_bytes(model, x) / 8 / MIB
    assert 0.01 < kept < expected / 4
    with torch.no_grad():
        memtl.print_trainable_parameters(model, x=x)
    line = f"saved for backward: {kept:.2f} MiB a sample of {expected:.2f} stock (batch 8)"
    assert line_of(capsys) == line
    assert [type(module) for module in model.modules()] == classes


def test_compiled_models_are_measured_too(capsys):
    model = nn.Sequential(nn.Linear(8, 30000), nn.GELU(), nn.Linear(30000, 2))
    memtl.apply(model, memtl.BackRazorConfig())
    x = torch.randn(4, 8)
    compiled = torch.compile(model, backend="eager")
    memtl.print_trainable_parameters(compiled, x)
    (found,) = re.findall(r"([\d.]+) MiB a sample of ([\d.]+) stock", line_of(capsys))
    kept, plain = map(float, found)
    assert kept == round(saved_bytes(compiled, x) / 4 / MIB, 2)
    assert plain == round((8 + 30000 + 30000) * 4 / MIB, 2) > 2 * kept


def test_measuring_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
    memtl.apply(model, memtl.LowBitConfig())
    x = images().images
    model(x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    memtl.print_trainable_parameters(model, x)
    for name, t in model.state_dict().items():
        assert_same(t, before[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_stock_runs_the_layers_own_forward():
    model, x = vit(), images().images
    plain = saved_bytes(model, x)
    memtl.apply(model, memtl.BackRazorConfig())
    with pytest.raises(KeyError), stock(model):
        assert saved_bytes(model, x) == plain
        assert type(model.head) is nn.Linear
        raise KeyError
    assert saved_bytes(model, x) < plain / 4
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"), stock(None):
        pass


def test_no_room_for_stock_is_said(capsys, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 300), nn.GELU())
    memtl.apply(model, memtl.BackRazorConfig())

    def full(x):
        if type(model[0]) is nn.Linear:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return nn.Sequential.forward(model, x)

    monkeypatch.setattr(model, "forward", full)
    memtl.print_trainable_parameters(model, torch.randn(4, 3))
    assert line_of(capsys).endswith("MiB a sample, where stock does not fit (batch 4)")
    assert type(model[0]) is not nn.Linear


def test_what_has_no_samples():
    with pytest.raises(ValueError, match="a tensor with a sample a row"):
        memtl.print_trainable_parameters(nn.Linear(3, 2), torch.tensor(3.0))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        memtl.print_trainable_parameters("model")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        memtl.trainable_parameters([])
