"""What memtl.memory counts."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memtl.memory import (
    MIB,
    Profile,
    SavedTensors,
    comparison,
    freed_memory_returned,
    peak_bytes,
    profile,
    saved_bytes,
    step_seconds,
)


def test_a_network_counted_by_hand():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    # linear keeps its input, GELU its input, the second linear its input; the output is not kept.
    assert saved_bytes(model, x) == 4 * 5 * (8 + 16 + 16)


def test_a_storage_counts_once():
    x = torch.randn(6, 10, requires_grad=True)
    assert saved_bytes(lambda: x.sin()) == 4 * 60
    assert saved_bytes(lambda: (x.sin(), x.cos(), x.exp().sum())) == 4 * (60 + 60)  # x, exp(x)


def test_a_view_keeps_its_whole_storage_alive():
    base = torch.randn(100, 10)
    view = base[:3].requires_grad_()
    assert saved_bytes(lambda: view.sin()) == base.untyped_storage().nbytes() == 4000


def test_parameters_and_buffers_are_left_out():
    layer = nn.Linear(7, 9)
    x = torch.randn(3, 7, requires_grad=True)
    assert saved_bytes(layer, x) == 4 * 21  # the weight is saved too, for the gradient of x
    norm = nn.BatchNorm1d(7).eval()
    with SavedTensors(norm) as saved:
        out = norm(x)
    assert saved.bytes == sum(saved.by_layer.values())
    identities = {b.untyped_storage()._cdata for b in norm.buffers()}
    assert identities and identities <= saved._own
    del out


def test_frozen_parameters_are_left_out_too():
    layer = nn.Linear(7, 9).requires_grad_(False)
    assert saved_bytes(layer, torch.randn(3, 7, requires_grad=True)) == 0


def test_sparse_tensors_are_counted_by_their_parts():
    sparse = torch.eye(6).to_sparse()
    x = torch.randn(6, 4, requires_grad=True)
    assert saved_bytes(lambda: torch.sparse.mm(sparse, x)) == 2 * 6 * 8 + 6 * 4


def test_a_lazy_layer_is_counted_from_its_first_run_on():
    layer = nn.LazyLinear(3)
    assert saved_bytes(layer, torch.randn(5, 8)) == 4 * 5 * 8


def test_what_counts_twice_counts_once_between_layers_too():
    """The first to save a storage is the layer it is counted for."""
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})
    x = torch.randn(5, 8)
    with SavedTensors(model) as saved:
        out = model["a"](x) + model["b"](x)
    assert saved.by_layer == {"a": 160}
    del out


def test_layers_have_their_names_and_the_sum_is_the_total():
    model = nn.Sequential()
    model.add_module("first", nn.Linear(8, 16))
    model.add_module("act", nn.Tanh())
    with SavedTensors(model) as saved:
        out = F.softmax(model(torch.randn(5, 8)), -1)
    assert saved.by_layer == {"first": 160, "act": 320, "": 320}
    assert saved.bytes == 800
    del out


def test_hooks_are_gone_afterwards_even_after_an_error():
    def fail():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        saved_bytes(fail)
    from torch.nn.modules import module

    assert not module._global_forward_pre_hooks and not module._global_forward_hooks


def test_what_cannot_be_called():
    with pytest.raises(TypeError, match="must be callable, got Tensor"):
        saved_bytes(torch.zeros(1))


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert saved_bytes(nn.Linear(4, 4), torch.randn(2, 4)) == 0


def test_the_peak_of_a_known_allocation():
    peak = peak_bytes(lambda: torch.ones(64 * MIB // 4).sum())
    if peak is None:
        pytest.skip("no resident-set high-water mark on this system")
    assert 60 * MIB <= peak <= 96 * MIB


def test_a_profile():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    found = profile(model, torch.randn(32, 64), batch_size=32)
    assert found.saved == 4 * 32 * (64 + 256 + 256) == sum(found.by_layer.values())
    assert found.saved_per_sample == found.saved / 32
    assert all(p.grad is None for p in model.parameters())
    text = comparison(found, Profile(found.saved // 2, None, {"0": found.saved // 2}, 32, 0.5))
    assert "2.0x" in text and "n/a" in text and "0.500" in text
    assert found.seconds > 0


def test_a_profile_takes_no_times_where_they_would_be_of_page_faults():
    model, x = nn.Linear(64, 8), torch.randn(32, 64)
    with freed_memory_returned():
        stock, other = profile(model, x), profile(model, x)
    if peak_bytes(lambda: None) is not None:  # where there is a resident set to measure
        assert stock.seconds is None and other.seconds is None
        assert "seconds" not in comparison(stock, other)
    assert step_seconds(model, x) > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_profile_of_a_frozen_model():
    model = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(ValueError, match="no output needs a gradient"):
        profile(model, torch.randn(2, 4))


def test_memory_that_was_freed_before_is_not_in_the_peak_of_what_comes_next():
    def many(count):
        tensors = [torch.ones(MIB // 4) for _ in range(count)]
        return sum(t[0] for t in tensors)

    with freed_memory_returned():
        first = peak_bytes(lambda: many(100))
        if first is None:
            pytest.skip("no resident-set high-water mark on this system")
        second = peak_bytes(lambda: many(10))
        third = peak_bytes(lambda: many(100))
    assert 95 * MIB <= first <= 120 * MIB
    assert 9 * MIB <= second <= 30 * MIB
    assert 95 * MIB <= third <= 120 * MIB


def test_what_was_measured_is_freed():
    weights = []

    def once():
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Softmax(-1), nn.Linear(4, 4))
        weights.append(weakref.ref(model[0].weight))
        assert saved_bytes(model, torch.randn(3, 4)) > 0

    once()
    gc.collect()
    assert weights[0]() is None
