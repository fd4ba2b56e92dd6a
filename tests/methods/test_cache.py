"""The cache of a frozen backbone: the same outputs and gradients, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import memtl
import memtl.methods.vqt.cache as module
from memtl.methods.vqt import FeatureCache, FromCache
from memtl.tasks import Split
from memtl.training import Settings, evaluate, fit
from tests.helpers import assert_same, assert_within
from tests.methods.networks import images, vit


@pytest.fixture
def model():
    model = vit()
    memtl.apply(model, memtl.VQTConfig(num_queries=2, num_classes=5, dropout=0.0))
    return model


@pytest.fixture
def data():
    return images(23)


@pytest.fixture
def cache(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 12_000)  # several files
    return FeatureCache.build(tmp_path / "cache", model, data.images, batch_size=5, progress=False)


def test_outputs_and_gradients_are_those_of_the_model(cache, model, data):
    assert len(cache) == 23 and len(list(cache.directory.glob("0*.safetensors"))) > 2
    index = torch.tensor([22, 0, 7, 7])
    expected, actual = model(data.images[index]), FromCache(model)(cache[index])
    # in another batch a matrix product may be summed in another order
    assert_within(actual, expected, 1e-5 * expected.abs().max().item())
    parameters = list(model.head.parameters())
    wanted = torch.autograd.grad(expected.logsumexp(1).sum(), parameters)
    for a, b in zip(
        torch.autograd.grad(actual.logsumexp(1).sum(), parameters), wanted, strict=True
    ):
        assert_within(a, b, 1e-5 * b.abs().max().item())


def test_it_stands_in_the_place_of_images(cache, model, data):
    settings = Settings(steps=12, batch_size=8, learning_rate=0.01)
    twin = copy.deepcopy(model)
    found = fit(FromCache(model), Split(cache, data.labels), None, settings, progress=False)
    stock = fit(twin, data, None, settings, progress=False)
    assert found.losses == pytest.approx(stock.losses, rel=1e-4)
    assert evaluate(FromCache(model), Split(cache, data.labels)) == evaluate(model, data)
    assert_within(model.head.queries, twin.head.queries, 1e-4)
    sizes = [len(batch) for batch in cache.split(9)]
    assert sizes == [9, 9, 5]


def test_it_is_found_again_by_another_process_model(cache, model, data):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.queries.add_(1)  # what trains does not matter
    again = FeatureCache.open(cache.directory, twin, data.images)
    assert_same(again[3:5].keys, cache[3:5].keys)


def test_bf16_halves_it(tmp_path, cache, model, data):
    half = FeatureCache.build(tmp_path / "h", model, data.images, dtype="bf16", progress=False)
    a, b = half[:], cache[:]
    assert a.keys.dtype == torch.float32
    assert_within(a.keys, b.keys, b.keys.abs() * 2**-8)
    assert_same(a.features, b.features)
    assert half.nbytes < 0.65 * cache.nbytes


def test_masks_and_scales_of_attention(tmp_path, data):
    from timm.models.beit import Beit

    model = Beit(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5,
        use_rel_pos_bias=True, use_abs_pos_emb=False,
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    memtl.apply(model, memtl.VQTConfig(dropout=0.0))
    cache = FeatureCache.build(tmp_path / "c", model, data.images, progress=False)
    assert cache[:1].masks[0] is not None
    again = FeatureCache.open(tmp_path / "c", model, data.images)
    expected = model(data.images)
    assert_within(FromCache(model)(again[:]), expected, 1e-5 * expected.abs().max().item())


def test_other_weights_or_images_are_refused(cache, model, data):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[1].mlp.fc1.bias[3] += 1e-3
    with pytest.raises(ValueError, match="was made of other weights: sha256"):
        FeatureCache.open(cache.directory, other, data.images)
    changed = data.images.clone()
    changed[22, 0, 0, 0] += 1e-3
    for images_ in (changed, data.images[:-1], data.images.flip(0)):
        with pytest.raises(ValueError, match="was made of other images: sha256"):
            FeatureCache.open(cache.directory, model, images_)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "index", "unfinished"])
def test_damaged_caches_are_refused(cache, model, data, damage):
    shard, index = cache.directory / "00001.safetensors", cache.directory / "cache.json"
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-64])
        case "altered":
            content = bytearray(shard.read_bytes())
            content[-5] ^= 4
            shard.write_bytes(content)
        case "missing":
            shard.unlink()
        case "index":
            index.write_text(index.read_text()[:99])
        case "unfinished":
            index.unlink()
    named = {"index": "cache.json is damaged", "unfinished": "holds no finished cache"}
    with pytest.raises((ValueError, FileNotFoundError), match=named.get(damage, shard.name)):
        FeatureCache.open(cache.directory, model, data.images)[:]


def test_what_cannot_be_cached(tmp_path, model, data, cache):
    with pytest.raises(FileExistsError, match="is not empty"):
        FeatureCache.build(cache.directory, model, data.images)
    with pytest.raises(TypeError, match="VQT was not applied to this VisionTransformer"):
        FeatureCache.build(tmp_path / "x", vit(), data.images)
    with pytest.raises(ValueError, match="empty split"):
        FeatureCache.build(tmp_path / "x", model, data.images[:0])
    with pytest.raises(ValueError, match="dtype must be one of"):
        FeatureCache.build(tmp_path / "x", model, data.images, dtype="fp32")
    trained = vit()
    memtl.apply(trained, memtl.VQTConfig(train_backbone=True))
    with pytest.raises(ValueError, match="reads what changes"):
        FeatureCache.build(tmp_path / "x", trained, data.images)
    with pytest.raises(IndexError, match=r"positions must be in 0 \.\. 22"):
        cache[torch.tensor([23])]
    json.loads((cache.directory / "cache.json").read_text())
    with pytest.raises(TypeError, match=r"int64, got torch\.bool"):
        cache[torch.ones(23, dtype=torch.bool)]
    with pytest.raises(IndexError, match="no position"):
        cache[0:0]


@pytest.mark.parametrize("change", ["pooling", "activation", "precision"])
def test_another_computation_from_the_same_weights_is_refused(cache, model, data, change):
    match change:
        case "pooling":
            model.global_pool = "avg"
        case "activation":
            for block in model.blocks:
                block.mlp.act = nn.ReLU()
        case "precision":
            model.bfloat16()
    images_ = data.images.to(model.head.queries.dtype)
    with pytest.raises(ValueError, match="computes something else|made of other weights"):
        FeatureCache.open(cache.directory, model, images_)


def test_a_cache_of_autocast_is_not_one_of_float32(tmp_path, model, data):
    with torch.autocast("cpu", torch.bfloat16):
        FeatureCache.build(tmp_path / "c", model, data.images, progress=False)
        FeatureCache.open(tmp_path / "c", model, data.images)
    with pytest.raises(ValueError, match="computes something else"):
        FeatureCache.open(tmp_path / "c", model, data.images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(tmp_path, model, data, dtype):
    model, x = model.to(dtype), data.images.to(dtype)
    FeatureCache.build(tmp_path / "c", model, x, progress=False)
    batch = FeatureCache.open(tmp_path / "c", model, x)[:4]
    assert batch.keys.dtype == dtype
    expected = model(x[:4])
    unit = torch.finfo(dtype).eps
    assert_within(FromCache(model)(batch), expected, 20 * unit * expected.abs().max().item())


def test_masks_of_each_image_cannot_be_cached(tmp_path, model, data):
    def masked(block, args, kwargs):
        x = args[0]
        return args, {"attn_mask": (x[:, :1, :1] * torch.ones(1, x.shape[1], x.shape[1]))[:, None]}

    for block in model.blocks:
        block.register_forward_pre_hook(masked, with_kwargs=True)
    with pytest.raises(ValueError, match="the mask of block 0 differs from image to image"):
        FeatureCache.build(tmp_path / "c", model, data.images, progress=False)


def test_a_build_that_was_ended_is_not_in_the_way(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    read, calls = module.read, []

    def ended(*args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args)
        return read(*args)

    monkeypatch.setattr(module, "read", ended)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(tmp_path / "c", model, data.images, batch_size=8, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c.building"]
    monkeypatch.setattr(module, "read", read)
    assert len(FeatureCache.build(tmp_path / "c", model, data.images, progress=False)) == 23
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_selection_and_saving_through_the_wrapper(tmp_path, cache, model, data):
    wrapped, split = FromCache(model), Split(cache, data.labels)
    settings = Settings(steps=2, batch_size=8)
    memtl.select_features(wrapped, split, 0.5, settings, progress=False)
    assert model.head.linear.weight.shape == (5, 56)
    memtl.save(wrapped, tmp_path / "s")
    fresh = vit()
    own = model.state_dict()
    fresh.load_state_dict({n: own.get(n, t) for n, t in fresh.state_dict().items()})
    memtl.load(fresh, tmp_path / "s")
    assert_same(fresh.eval()(data.images), model.eval()(data.images))


def test_modes_survive_a_failure(model, data, tmp_path):
    model.train()
    model.blocks[0].mlp.train()
    modes = [m.training for m in model.modules()]
    wrong = torch.randn(4, 1, 16, 16)
    with pytest.raises(RuntimeError):
        FeatureCache.build(tmp_path / "c", model, wrong, progress=False)
    with pytest.raises(RuntimeError):
        evaluate(model, Split(wrong, torch.zeros(4)))
    assert [m.training for m in model.modules()] == modes
    evaluate(model, data)
    assert [m.training for m in model.modules()] == modes
