"""Caches are found again, built anew where they are damaged, and no larger than allowed."""

import pytest
import torch

from memtl.methods import VQTConfig, apply
from memtl.methods.vqt import FeatureCache
from memtl.tasks import Split
from memtl.vtab import Backbone, Caches, caches

pytest.importorskip("timm")
BACKBONE = Backbone("test_vit", channels=1, size=32)


def network(seed: int = 1) -> torch.nn.Module:
    model = BACKBONE.build(3, seed)
    apply(model, VQTConfig())
    return model


@pytest.fixture
def split():
    return Split(torch.randn(8, 1, 32, 32), torch.arange(8) % 3)


def test_a_cache_is_found_again(split, tmp_path):
    first = Caches(tmp_path).split("test_vit", network(1), split)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = Caches(tmp_path)
    found = again.split("test_vit", network(2), split)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert torch.equal(first.images[:].keys, found.images[:].keys)
    assert found.labels is split.labels
    assert again.nbytes == first.images.nbytes > 0


def test_others_have_their_own(split, tmp_path):
    """Weights, images, and an architecture that the same weights are loaded into."""
    many, other = Caches(tmp_path), network()
    with torch.no_grad():
        other.cls_token.add_(1)
    many.split("test_vit", network(), split)
    many.split("test_vit", other, split)
    many.split("test_vit", network(), Split(split.images + 1, split.labels))
    many.split("another", network(), split)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("cache.json", b"{", "is damaged"),
        ("cache.json", None, None),
        ("00001.safetensors", b"nothing", "is damaged, truncated or altered"),
        ("constants.safetensors", None, "the cache lacks"),
    ],
)
def test_a_damaged_cache_is_built_anew(split, tmp_path, file, content, said, capsys, monkeypatch):
    monkeypatch.setattr("memtl.methods.vqt.cache.SHARD_BYTES", 1)
    monkeypatch.setattr(caches, "BATCH", 3)
    many = Caches(tmp_path)
    expected = many.split("test_vit", network(), split).images[:]
    (place,) = tmp_path.iterdir()
    assert len(list(place.glob("0*.safetensors"))) == 3
    if content is None:
        (place / file).unlink()
    else:
        (place / file).write_bytes(content)
    found = many.split("test_vit", network(), split).images[:]
    assert torch.equal(found.values, expected.values)
    text = capsys.readouterr().out
    if said is None:  # it was never finished
        assert "anew" not in text
    else:
        assert text.startswith("a cache is built anew: ") and said in text
    assert [*tmp_path.iterdir()] == [place]
    assert len(FeatureCache.open(place, network(), split.images)) == 8


def test_a_larger_one_is_not_made(split, tmp_path, capsys):
    one = Caches(tmp_path).split("test_vit", network(), split).images[:1]
    size = 8 * sum(t.nbytes for t in (one.features, one.keys, one.values))
    for limit in (size - 1, 0):
        many = Caches(tmp_path / "none", limit)
        assert many.split("test_vit", network(), split) is split
        assert many.split("test_vit", network(), split) is split
        assert many.nbytes == 0
    (text,) = capsys.readouterr().out.splitlines()
    assert text.startswith(f"a cache for 8 images would be {size / 2**30:.3g} GiB, more than")
    assert Caches(tmp_path, size).split("test_vit", network(), split) is not split
