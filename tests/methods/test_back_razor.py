"""BackRazorConfig as a value, and apply() as the one entry point."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import memtl
from memtl import BackRazorConfig
from memtl.storage import CenteredTopK, Dense, Quantized, SignMean, TopK


@pytest.mark.parametrize(
    ("keep", "error"),
    [(0, ValueError), (-0.1, ValueError), (1.5, ValueError), (float("nan"), ValueError),
     (True, TypeError), ("0.1", TypeError), (None, TypeError)],
)  # fmt: skip
def test_keep_must_be_a_fraction(keep, error):
    with pytest.raises(error, match=r"keep must be"):
        BackRazorConfig(keep=keep)


def test_formats_must_be_formats():
    with pytest.raises(TypeError, match="norm must be a memtl.storage.Format or None, got str"):
        BackRazorConfig(norm="4-bit")
    with pytest.raises(TypeError, match="target_modules must be None, a string or strings"):
        BackRazorConfig(target_modules=[1])


def test_keep_fills_what_formats_leave_open():
    formats = BackRazorConfig(keep=0.25, linear=TopK(0.5), attention=None).formats()
    assert formats["linear"].keep == 0.5
    assert formats["convolution"].keep == 0.25
    assert formats["attention"] is None
    assert formats["norm"] == Quantized(4)


def test_the_presets():
    assert BackRazorConfig.preset("fast", keep=0.03) == BackRazorConfig(keep=0.03)
    paper = BackRazorConfig.preset("paper", keep=0.2)
    assert paper.linear == paper.attention == TopK(scope="sample", values="fp16")
    assert paper.norm == TopK(scope="sample", values="fp32")
    assert paper.activation == Dense("fp16")
    assert BackRazorConfig.preset("paper", norm=None).norm is None
    with pytest.raises(ValueError, match="preset must be one of .* got 'papper'"):
        BackRazorConfig.preset("papper")


@pytest.mark.parametrize(
    "config",
    [
        BackRazorConfig(),
        BackRazorConfig.preset("paper", keep=0.03),
        BackRazorConfig(
            keep=0.5,
            linear=TopK(0.2, values="bf16"),
            activation=None,
            target_modules=["blocks"],
            exclude_modules=r".*head",
        ),
        BackRazorConfig(linear=CenteredTopK(values="bf16"), convolution=SignMean()),
    ],
    ids=["fast", "paper", "own", "others"],
)
def test_json_round_trip(config):
    text = config.to_json()
    assert BackRazorConfig.from_json(text) == config
    assert json.loads(text)["method"] == "back_razor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "vqt"}, '"method": "back_razor"'),
        ({"keeep": 1}, r"unknown fields \['keeep'\]"),
        ({"keep": 3}, r"keep must be in \(0, 1\], got 3"),
        ({"linear": {"kind": "zip"}}, "kind must be one of"),
    ],
)
def test_bad_json(change, message):
    data = {**json.loads(BackRazorConfig().to_json()), **change}
    with pytest.raises(ValueError, match=message):
        BackRazorConfig.from_json(json.dumps(data))


def test_what_is_no_json():
    with pytest.raises(ValueError):
        BackRazorConfig.from_json(BackRazorConfig().to_json()[:40])
    with pytest.raises(ValueError, match="JSON object"):
        BackRazorConfig.from_json("[]")


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BackRazorConfig().keep = 0.5


def test_apply_wants_a_configuration():
    model = nn.Linear(3, 3)
    for wrong in ("back_razor", None, BackRazorConfig):
        with pytest.raises(TypeError, match="config must be a method's configuration"):
            memtl.apply(model, wrong)


@pytest.mark.parametrize("format", [TopK(), CenteredTopK(), SignMean(None)], ids=str)
def test_apply_on_a_single_layer_and_its_gradients(format):
    layer = nn.Linear(300, 7)
    x = torch.randn(20, 300)
    report = memtl.apply(layer, BackRazorConfig(keep=0.1, linear=format))
    assert [row.name for row in report.converted] == [""]
    grad_out = torch.randn(20, 7)
    layer(x).backward(grad_out)
    stored = memtl.storage.pack(x, format.resolve(0.1)).unpack()
    torch.testing.assert_close(layer.weight.grad, grad_out.t() @ stored)
    torch.testing.assert_close(layer.bias.grad, grad_out.sum(0))
