"""Feature selection: the features, the penalty, what is kept, and the compact model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import memtl
from memtl.methods import applied
from memtl.methods.base.features import OnFeatures, collect
from memtl.methods.base.head import ChunkedHead
from memtl.tasks import Split
from memtl.training import Settings, evaluate
from tests.helpers import assert_same
from tests.methods.networks import images, vit

SETTINGS = Settings(steps=30, batch_size=8, learning_rate=0.05, weight_decay=0.0)


@pytest.fixture
def model():
    model = vit()
    memtl.apply(model, memtl.VQTConfig(num_queries=2, num_classes=5, dropout=0.5))
    return model


@pytest.fixture
def data():
    return images(40)


def test_features_are_what_the_classifier_multiplies(model, data):
    model.train()
    features = collect(model, data.images, batch_size=7)
    assert features.shape == (40, 16 + 3 * 2 * 16) and model.training
    expected = model.eval()(data.images)
    torch.testing.assert_close(OnFeatures(model.head.linear)(features), expected)
    chunks = features.split(model.head.linear.sizes, dim=1)
    for chunk in chunks:
        torch.testing.assert_close(chunk.norm(dim=1), torch.ones(40))
    plain = vit()
    torch.testing.assert_close(
        OnFeatures(plain.head)(collect(plain, data.images)), plain.eval()(data.images)
    )


def test_chunked_head_is_linear_on_normalised_chunks():
    sizes = (3, 5, 2)
    chunks = [torch.randn(4, n, dtype=torch.float64, requires_grad=True) for n in sizes]
    for normalize in (True, False):
        for selected in (None, torch.tensor([0, 2, 3, 7, 9])):
            head = ChunkedHead(
                sizes, 6, normalize, None if selected is None else 5, dtype=torch.float64
            )
            if selected is not None:
                head.selected.copy_(selected)
            x = torch.cat([F.normalize(c, dim=1) if normalize else c for c in chunks], dim=1)
            x = x if selected is None else x[:, selected]
            expected = F.linear(x, head.weight, head.bias)
            actual = head(chunks)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
            out = torch.randn_like(actual)
            wanted = torch.autograd.grad(expected, [*chunks, head.weight], out)
            found = torch.autograd.grad(actual, [*chunks, head.weight], out)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_selection_may_leave_a_chunk_out():
    head = ChunkedHead((3, 4, 2), 2, True, 3)
    head.selected.copy_(torch.tensor([0, 7, 8]))
    assert [i.tolist() for i in head.indices()] == [[0], [], [0, 1]]
    assert head([torch.randn(5, n) for n in (3, 4, 2)]).shape == (5, 2)


def test_the_head_keeps_its_chunks_and_little_more():
    chunks = [torch.randn(64, 1000, requires_grad=True) for _ in range(3)]
    head = ChunkedHead((1000,) * 3, 4)
    saved = memtl.memory.saved_bytes(lambda head: head([c * 1 for c in chunks]), head)
    # the chunks; a norm, its clamp and a quotient of each
    assert saved <= 3 * 64 * (1000 + 4 + 8) * 4


def test_a_zero_chunk_is_zero_not_nan():
    head = ChunkedHead((3, 2), 2)
    x = torch.zeros(1, 3, requires_grad=True)
    y = head([x, torch.ones(1, 2)])
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_wrong_chunks_and_selections():
    head = ChunkedHead((3, 2), 2)
    with pytest.raises(ValueError, match=r"expected chunks of \(3, 2\) features, got \(3, 3\)"):
        head([torch.randn(1, 3), torch.randn(1, 3)])
    for selected in (0, 6):
        with pytest.raises(ValueError, match=r"selected must be in 1 \.\. 5"):
            ChunkedHead((3, 2), 2, selected=selected)


def test_the_largest_columns_are_kept_and_the_compact_head_is_in_place(model, data, tmp_path):
    dim = model.head.linear.weight.shape[1]
    queries = model.head.queries.detach().clone()
    result = memtl.select_features(model, data, 0.3, SETTINGS, progress=False)
    count = int(0.3 * dim)
    assert result.scores.shape == (dim,) and len(result.kept) == count
    left = torch.ones(dim, dtype=torch.bool)
    left[result.kept] = False
    assert result.scores[result.kept].min() >= result.scores[left].max()
    assert (result.kept.diff() > 0).all()
    assert model.head.linear.weight.shape == (5, count)
    assert_same(model.head.linear.selected, result.kept)
    assert_same(model.head.queries, queries)
    assert model.head.queries.requires_grad  # so that it is saved
    assert applied(model)[-1].selected == count
    assert "kept 33 of 112 features" in str(result) and "block 2" in str(result)

    memtl.save(model, tmp_path)
    fresh = vit()
    own = model.state_dict()
    fresh.load_state_dict({n: own.get(n, t) for n, t in fresh.state_dict().items()}, strict=True)
    memtl.load(fresh, tmp_path)
    assert_same(fresh.eval()(data.images), model.eval()(data.images))
    (weights,) = tmp_path.glob("*.safetensors")
    assert weights.stat().st_size < 4 * (queries.numel() + 5 * count + 5) + 8 * count + 600


def test_the_penalty_is_the_group_lasso(model, data):
    plain = memtl.select_features(copy_of(model), data, 0.5, SETTINGS, penalty=0.0, progress=False)
    strong = memtl.select_features(copy_of(model), data, 0.5, SETTINGS, penalty=0.1, progress=False)
    assert strong.scores.sum() < 0.8 * plain.scores.sum()
    start = strong.scoring.losses[0] - plain.scoring.losses[0]
    with torch.random.fork_rng():
        torch.manual_seed(SETTINGS.seed)
        head = ChunkedHead(model.head.linear.sizes, 5)
    expected = 0.1 * head.weight.norm(dim=0).sum().item()
    assert start == pytest.approx(expected, rel=1e-4)
    again = memtl.select_features(copy_of(model), data, 0.5, SETTINGS, penalty=0.1, progress=False)
    assert_same(again.kept, strong.kept)


def copy_of(model):
    import copy

    return copy.deepcopy(model)


def test_selection_learns(data):
    model = vit()
    memtl.apply(model, memtl.VQTConfig(num_queries=1, num_classes=5))
    settings = dataclasses.replace(SETTINGS, steps=150)
    memtl.select_features(model, data, 0.5, settings, progress=False)
    assert evaluate(model, data) > 0.8


def test_what_cannot_be_selected(model, data):
    for fraction in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
            memtl.select_features(model, data, fraction, SETTINGS)
    with pytest.raises(ValueError, match="keeps none"):
        memtl.select_features(model, data, 0.001, SETTINGS)
    with pytest.raises(ValueError, match="penalty must be at least 0"):
        memtl.select_features(model, data, 0.5, SETTINGS, penalty=-1)
    with pytest.raises(TypeError, match="VQT, Head2Toe.* got a Linear"):
        memtl.select_features(vit(), data, 0.5, SETTINGS)
    memtl.select_features(model, Split(data.images[:8], data.labels[:8]), 0.5, SETTINGS)
    with pytest.raises(ValueError, match="selected already"):
        memtl.select_features(model, data, 0.5, SETTINGS)
