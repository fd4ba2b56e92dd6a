"""The methods of ``memtl vtab``: each trains, and from a cache as from images."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from memtl.tasks import Split
from memtl.training import Settings, fit
from memtl.vtab import Backbone, Caches, methods

pytest.importorskip("timm")
SETTINGS = Settings(steps=3, batch_size=4, learning_rate=0.01, weight_decay=0.0)


@pytest.fixture
def known(tmp_path):
    backbone = Backbone("test_vit", channels=1, size=32)
    return {method.name: method for method in methods(backbone, Caches(tmp_path / "cache"))}


@pytest.fixture
def split():
    return Split(torch.randn(8, 1, 32, 32), torch.arange(8) % 3)


def test_grids_are_of_one_size(known):
    assert len({len(method.grid) for method in known.values()}) == 1


def test_every_method_trains_and_the_seed_decides(known, split):
    for name, method in known.items():
        model = method.build(3, 1)
        taken = split if method.prepare_data is None else method.prepare_data(model, split)
        first = F.cross_entropy(model(taken.images[:]), split.labels).item()
        again = F.cross_entropy(method.build(3, 1)(taken.images[:]), split.labels).item()
        other = F.cross_entropy(method.build(3, 2)(taken.images[:]), split.labels).item()
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        fit(model, taken, None, SETTINGS, progress=False)
        changed = {n for n, p in model.named_parameters() if n in before and p.ne(before[n]).any()}
        assert before and changed == set(before), name
        # dropout is drawn from the global generator
        assert name != "linear probe" or first == again != other
        assert other != first


@pytest.mark.parametrize("name", ["linear probe", "Head2Toe", "VQT"])
def test_what_is_prepared_gives_what_images_give(known, split, name):
    model = known[name].build(3, 1).eval()
    taken = known[name].prepare_data(model, split)
    torch.testing.assert_close(model(taken.images[:]), model(split.images))


def test_selection_halves_the_head(known, split):
    method = known["VQT (half kept)"]
    model = method.build(3, 1)
    taken = method.prepare_data(model, split)
    features = model.get_classifier().linear.weight.shape[1]
    fit(model, taken, None, SETTINGS, progress=False)
    settings = dataclasses.replace(SETTINGS, steps=2)
    model = method.finish(model, taken, settings)
    assert model.get_classifier().linear.weight.shape == (3, features // 2)
    assert model(split.images).shape == (8, 3)


def test_a_network_without_attention(tmp_path):
    backbone = Backbone("test_resnet", channels=1, size=32)
    found = [method.name for method in methods(backbone, Caches(tmp_path))]
    assert found == ["linear probe", "full fine-tuning"]
