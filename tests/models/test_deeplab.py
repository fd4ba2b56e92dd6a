import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

import memtl
from memtl import assets
from memtl.memory import SavedTensors
from memtl.models import Segmenter


def segmenter(name: str = "resnet10t", num_classes: int = 5, **options) -> Segmenter:
    options = {"width": 8, "atrous_rates": (1, 2)} | options
    return Segmenter(timm.create_model(name, in_chans=1), num_classes, **options)


# A plain network; families whose classifier begins with a wider convolution; with layer norms.
FAMILIES = pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv2_035", "mobilenetv3_small_050", "convnext_atto"]
)


@FAMILIES
def test_logits_are_as_large_as_the_images(name):
    model = segmenter(name).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 64, 96)).shape == (2, 5, 64, 96)
    assert model.num_classes == 5


@FAMILIES
def test_it_is_a_network_as_methods_expect_one(name):
    model = segmenter(name)
    assert model.get_classifier() is model.get_submodule("classifier")
    assert model.pretrained_cfg["input_size"] == model.default_cfg["input_size"]
    found = {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(
            lambda _, args, out, info=info: found.update({info["module"]: out})
        )
    model.eval()(torch.randn(1, 1, 64, 64))
    for info in model.feature_info:
        side = 64 // info["reduction"]
        assert found[info["module"]].shape == (1, info["num_chs"], side, side)
    assert model.feature_info[-1]["num_chs"] == model.classifier[0].convs[0][0].in_channels


@FAMILIES
def test_nothing_is_left_of_the_classifier(name):
    """Every parameter has a gradient, so none is of what follows the last feature map."""
    model = segmenter(name)
    F.cross_entropy(model(torch.randn(2, 1, 64, 64)), torch.randint(5, (2, 64, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "classifier"}


def test_the_backbone_is_copied():
    network = timm.create_model("resnet10t", in_chans=1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    model = Segmenter(network, 5, width=8)
    assert network.num_classes == 1000 and network.state_dict().keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(network.state_dict()[key], value)
        assert key.startswith("fc.") or torch.equal(model.backbone.state_dict()[key], value)
    assert model.backbone.conv1[0].weight is not network.conv1[0].weight
    assert model.training and all(m.training for m in model.modules())


def test_at_256_channels_the_head_is_that_of_torchvision():
    model = segmenter(width=256, atrous_rates=(12, 24, 36))
    head = DeepLabHead(512, 5)
    head.load_state_dict(model.classifier.state_dict())  # raises unless all keys are the same
    images, maps = torch.randn(2, 1, 64, 64), torch.randn(2, 512, 4, 4)
    assert torch.equal(head.eval()(maps), model.classifier.eval()(maps))
    assert str(head) == str(nn.Sequential.__str__(model.classifier)).replace(
        "Sequential(", "DeepLabHead(", 1
    )
    with torch.no_grad():
        logits = model.eval().classifier(model.backbone.forward_features(images))
        expected = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        assert torch.equal(model(images), expected)


def test_checkpointing_changes_no_gradient_and_keeps_less():
    model = assets.load_segmenter(width=8)
    images, labels = torch.randn(2, 1, 32, 32), torch.randint(11, (2, 32, 32))
    gradients, kept = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        with SavedTensors(model) as tensors:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        kept.append(tensors.bytes)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
    assert kept[1] < kept[0] / 2


CONFIGS = [
    memtl.BackRazorConfig(keep=0.1),
    memtl.LowBitConfig(bits=4),
    memtl.FrozenConfig(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
@pytest.mark.parametrize("training", [True, False])
def test_converted_forward_is_exact(config, training):
    model = assets.load_segmenter(width=8).train(training)
    if config.method == "frozen":
        model.backbone.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images, labels = torch.randn(2, 1, 32, 32), torch.randint(11, (2, 32, 32))

    def outputs() -> tuple[torch.Tensor, int]:
        model.load_state_dict(state)
        torch.manual_seed(0)  # of dropout
        with SavedTensors(model) as tensors:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        return logits.detach(), tensors.bytes

    before, kept = outputs()
    memtl.apply(model, config)
    after, fewer = outputs()
    assert torch.equal(before, after) and fewer < kept
    assert model.state_dict().keys() == state.keys()
    assert isinstance(model, Segmenter)


def test_batches_of_one_image_in_evaluation():
    model = segmenter().eval()
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images[:1]), model(images)[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_transformers_are_refused(name):
    network = timm.create_model(name)
    modes = [m.training for m in network.modules()]
    with pytest.raises(ValueError, match=r"must give feature maps \[n, \d+, height, width\], but"):
        Segmenter(network, 5)
    assert network.num_classes == 1000 and [m.training for m in network.modules()] == modes


def test_transformers_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"takes no images \[1, 3, 224, 224\]: Input height"):
        Segmenter(timm.create_model("vit_tiny_patch16_224", img_size=64), 5)
    with pytest.raises(
        ValueError, match="feature maps .* VisionTransformer gives \\[1, 65, 128\\]"
    ):
        Segmenter(assets.load("vit_glyphs"), 5)


def test_other_backbones_are_refused():
    with pytest.raises(TypeError, match="classifier of timm's, but a Sequential has no feature_in"):
        Segmenter(nn.Sequential(nn.Conv2d(1, 8, 3)), 5)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "num_classes must be an int, got float", {"num_classes": 5.0}),
        (ValueError, "num_classes must be at least 1, got 0", {"num_classes": 0}),
        (TypeError, "width must be an int, got bool", {"width": True}),
        (ValueError, "width must be at least 1, got -8", {"width": -8}),
        (
            ValueError,
            r"atrous_rates must be at least 1 each, got \(2, 0\)",
            {"atrous_rates": (2, 0)},
        ),
        (ValueError, r"atrous_rates must be at least 1 each, got \(\)", {"atrous_rates": ()}),
        (ValueError, r"dropout must be in \[0, 1\), got 1.0", {"dropout": 1.0}),
    ],
)
def test_wrong_arguments(error, message, options):
    with pytest.raises(error, match=message):
        segmenter(**options)


def test_missing_torchvision_names_the_extra(monkeypatch):
    network = timm.create_model("resnet10t")
    monkeypatch.setitem(sys.modules, "torchvision.models.segmentation.deeplabv3", None)
    with pytest.raises(ImportError, match=r"pip install memtl\[demo\]"):
        Segmenter(network, 5)
