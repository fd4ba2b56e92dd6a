import dataclasses

import pytest
import torch

from memtl import assets
from memtl.tasks import Split
from memtl.vtab import Backbone, Caches, methods
from memtl.vtab.methods import _features

timm = pytest.importorskip("timm")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.state_dict().items() if not name.startswith("head.")}


def same(first, second) -> bool:
    return all(map(torch.equal, weights(first).values(), weights(second).values()))


def test_the_shipped_network():
    backbone = Backbone("vit_glyphs", channels=1)
    assert backbone.image_size == 32 and assets.metadata()["sha256"] in backbone.weights
    first, second, again = (backbone.build(7, seed) for seed in (1, 2, 1))
    assert same(first, second) and same(first, assets.load())
    assert not torch.equal(first.head.weight, second.head.weight)
    assert torch.equal(first.head.weight, again.head.weight)
    assert first.head.out_features == 7


def test_a_network_of_timm():
    backbone = Backbone("test_vit", size=32)
    assert (backbone.image_size, Backbone("test_vit").image_size) == (32, 160)
    first = backbone.build(3, 1)
    assert same(first, backbone.build(3, 2)) and same(first, Backbone("test_vit", size=32).source)
    assert first(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    grey = Backbone("test_resnet", channels=1, size=48).build(3, 1)
    assert grey(torch.randn(2, 1, 48, 48)).shape == (2, 3)


def test_a_checkpoint(tmp_path):
    path = tmp_path / "other.pt"
    other = timm.create_model("test_vit", num_classes=5)
    torch.save(other.state_dict(), path)
    backbone = Backbone("test_vit", checkpoint=path)
    assert same(backbone.build(3, 0), other)
    assert backbone.weights.startswith("sha256 ")

    state = other.state_dict()
    for change, said in (
        ({"extra": state["cls_token"]}, "it also has extra"),
        ({"cls_token": None}, "it lacks cls_token"),
        ({"cls_token": torch.zeros(1, 1, 3)}, "size mismatch for cls_token"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        torch.save(changed, path)
        with pytest.raises(ValueError, match=f"does not hold the weights of test_vit: .*{said}"):
            _ = dataclasses.replace(backbone).source
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{path} does not hold the weights of test_vit: "):
        _ = dataclasses.replace(backbone).source


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": 3}, "vit_glyphs takes images of 1 channel and 32 x 32 pixels"),
        ({"channels": 1, "size": 33}, "vit_glyphs takes images of 1 channel and 32 x 32 pixels"),
        ({"channels": 1, "pretrained": True}, "vit_glyphs ships with its weights"),
    ],
)
def test_what_the_shipped_network_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        Backbone("vit_glyphs", **options)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*gone.pt"):
        Backbone("test_vit", checkpoint=tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="timm has no model 'nope'"):
        _ = Backbone("nope").source
    with pytest.raises(ValueError, match="timm has no model 'nope'"):
        methods(Backbone("nope", size=32), Caches(tmp_path))


def test_weights_that_cannot_be_had(monkeypatch):
    def create_model(*_, **__):
        raise OSError("no\n  network")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match="the weights of test_vit cannot be had: no network"):
        _ = Backbone("test_vit", pretrained=True).source


@pytest.mark.parametrize("name", ["vit_glyphs", "cnn_glyphs", "test_resnet"])
def test_the_linear_probe_is_the_network(name, tmp_path):
    backbone = Backbone(name, channels=1, size=32)
    probe, *_, full = (method.build(4, 3) for method in methods(backbone, Caches(tmp_path)))
    images = torch.randn(5, 1, 32, 32)
    prepared = _features(probe, Split(images, torch.zeros(5, dtype=torch.int64)))
    assert prepared.images.dim() == 2
    torch.testing.assert_close(probe(prepared.images), full.eval()(images))
    torch.testing.assert_close(probe(images), full(images))
    head = probe.get_classifier()
    trained = {id(p) for p in probe.parameters() if p.requires_grad}
    assert trained == {id(head.weight), id(head.bias)}
    assert all(p.requires_grad for p in full.parameters())
