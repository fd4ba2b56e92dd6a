"""ProxylessNAS-Mobile: the shape of the paper, the interface of timm."""

import pytest
import torch
from torch import nn

from memtl import models

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def model():
    return models.proxylessnas_mobile().eval()


def test_parameters_and_multiplications_are_those_published(model):
    assert sum(p.numel() for p in model.parameters()) == 4_080_512  # published: 4.08 M
    count = 0

    def multiply(module, _, y):
        nonlocal count
        count += y[0].numel() * module.weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(multiply) for layer in layers]
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    assert logits.shape == (1, 1000)
    assert round(count / 1e6, 1) == pytest.approx(320.4, abs=0.1)  # published: 320.4 M


def test_blocks_and_layers(model):
    blocks = [block for stage in model.blocks for block in stage]
    kernels = [block.conv_dw.kernel_size[0] for block in blocks]
    strides = [block.conv_dw.stride[0] for block in blocks]
    out = [conv.out_channels for b in blocks for conv in (getattr(b, "conv_pwl", b.conv_pw),)]
    assert kernels == [3, 5, 3, 7, 3, 5, 5, 7, 5, 5, 5, 5, 5, 5, 5, 7, 7, 7, 7, 7]
    assert [i for i, stride in enumerate(strides) if stride == 2] == [1, 3, 7, 15]
    assert out == [16, *[32] * 2, *[40] * 4, *[80] * 4, *[96] * 4, *[192] * 4, 320]
    assert [b.has_skip for b in blocks] == [a == b for a, b in zip([32, *out], out, strict=False)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}
    assert {type(norm.act) for norm in norms} == {nn.ReLU6, nn.Identity}


def test_the_interface_of_timm(model):
    assert model.get_classifier() is model.classifier
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert model.num_features == 1280
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 1280, 2, 2)
        torch.testing.assert_close(model.forward_head(features), model(x))
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert [f.shape[1] for f in maps] == [info["num_chs"] for info in model.feature_info]
    assert [64 // f.shape[-1] for f in maps] == [info["reduction"] for info in model.feature_info]
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 224, 224)


def test_checkpointing_changes_no_gradient():
    model = models.proxylessnas_mobile(num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)

    def gradient():
        return torch.autograd.grad(model(x).sum(), model.conv_stem.weight)[0]

    exact = gradient()
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(gradient(), exact)


def test_by_name_with_options():
    model = models.timm_model("proxylessnas_mobile", size=96, num_classes=7, in_chans=1)
    assert model(torch.randn(2, 1, 96, 96)).shape == (2, 7)
    model, arguments = models.build("proxylessnas_mobile", batch_size=2)
    assert arguments["x"].shape == (2, 3, 224, 224)
    model.reset_classifier(4)
    assert model.get_classifier().out_features == 4
    assert "proxylessnas_mobile" in models.NAMES


def test_there_are_no_weights():
    with pytest.raises(ValueError, match="no pre-trained weights of proxylessnas_mobile"):
        models.timm_model("proxylessnas_mobile", pretrained=True)
