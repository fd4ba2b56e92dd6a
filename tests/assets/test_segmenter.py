"""Shipped networks with dilations, and with a head for every pixel."""

import pytest
import torch

from memtl import assets
from memtl.assets import pretrain


@pytest.mark.parametrize("name", assets.names())
def test_input_size(name):
    model = assets.load(name)
    assert model.pretrained_cfg == model.default_cfg == {"input_size": (1, 32, 32)}
    assert model(torch.zeros(2, *model.pretrained_cfg["input_size"])).shape == (2, 62)


def test_input_size_of_another_architecture():
    model = assets.build(pretrain.RECIPES["vit"].architecture | {"img_size": 16, "in_chans": 2})
    assert model.default_cfg["input_size"] == (2, 16, 16)


@pytest.mark.parametrize("stride", [None, 8, 4, 2, 1])
def test_output_stride(stride):
    plain, model = (assets.load("cnn_glyphs", output_stride=s).eval() for s in (None, stride))
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        maps, own = model.forward_features(images), plain.forward_features(images)
    side = 32 // (stride or 8)
    assert maps.shape == (2, 512, side, side)
    assert model.feature_info[-1]["reduction"] == (stride or 8)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    if stride in (None, 8):
        assert torch.equal(maps, own)
    # Dilation computes the map of the strided network, and the places between.
    step = 8 // (stride or 8)
    torch.testing.assert_close(maps[..., ::step, ::step], own, rtol=1e-3, atol=1e-3)


def test_feature_maps_are_as_described():
    model = assets.load("cnn_glyphs").eval()
    maps = model.forward_intermediates(torch.randn(1, 1, 32, 32), intermediates_only=True)
    assert [32 // m.shape[-1] for m in maps] == [i["reduction"] for i in model.feature_info]


@pytest.mark.parametrize(
    ("error", "message", "name", "stride"),
    [
        (ValueError, "convolutional networks, which vit_glyphs is not", "vit_glyphs", 4),
        (ValueError, r"must be in \[1, 2, 4, 8\], got 16", "cnn_glyphs", 16),
        (ValueError, r"must be in \[1, 2, 4, 8\], got 0", "cnn_glyphs", 0),
        (TypeError, "output_stride must be an int, got float", "cnn_glyphs", 4.0),
    ],
)
def test_wrong_output_stride(error, message, name, stride):
    with pytest.raises(error, match=message):
        assets.load(name, output_stride=stride)


def test_segmenter():
    torch.manual_seed(3)
    model = assets.load_segmenter()
    torch.manual_seed(3)
    again = assets.load_segmenter()
    other = assets.load_segmenter()
    assert model.num_classes == 11 and model.training
    assert model.feature_info[-1]["reduction"] == 4
    assert model.default_cfg["input_size"] == (1, 32, 32)
    with torch.no_grad():
        assert model(torch.randn(2, 1, 64, 64)).shape == (2, 11, 64, 64)
    shipped = assets.load("cnn_glyphs").state_dict()
    for key, value in assets.load_segmenter().backbone.state_dict().items():
        assert torch.equal(value, shipped[key]), key
    heads = [
        torch.cat([p.flatten() for p in m.classifier.parameters()]) for m in (model, again, other)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_segmenter_of_a_transformer():
    with pytest.raises(ValueError, match="output_stride is for convolutional networks"):
        assets.load_segmenter("vit_glyphs")
