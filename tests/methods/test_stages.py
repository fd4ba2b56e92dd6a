"""The stages of a network: by its feature information, whatever the family."""

import pytest
import torch
from torch import nn

from memtl.methods.base.stages import Stages
from tests.helpers import assert_same
from tests.methods.convnets import build, images

timm = pytest.importorskip("timm")


def firsts(stages):
    return [blocks[0].name for blocks in stages.blocks]


def staged():
    """Two stages, of one block each."""
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    other = nn.Sequential(nn.Conv2d(8, 16, 2, 2))
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 8, 4, 4)
    model.stages = nn.Sequential(nn.Sequential(block), nn.Sequential(other))
    model.feature_info = [
        {"module": f"stages.{i}", "num_chs": 8 << i, "reduction": 4 << i} for i in range(2)
    ]
    return model


def test_mobilenetv2():
    found = Stages.of(build("mobilenetv2_100"))
    assert found.stem == "conv_stem" and found.image == (3, 224, 224)
    assert firsts(found) == [f"blocks.{i}.0" for i in range(1, 7)]
    assert [len(blocks) for blocks in found.blocks] == [2, 3, 4, 3, 3, 1]
    first = found.blocks[0][0]
    assert (first.entry, first.reads, first.gives) == ("blocks.1.0", (16, 112, 112), (24, 56, 56))
    last = found.blocks[-1][0]
    assert (last.reads, last.gives) == ((160, 7, 7), (320, 7, 7))


def test_resnet():
    found = Stages.of(build("resnet18"), image_size=64)
    assert found.stem == "conv1"
    assert firsts(found) == [f"layer{i}.0" for i in range(1, 5)]
    assert [blocks[0].gives for blocks in found.blocks] == [
        (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)
    ]  # fmt: skip


def test_convnext_reads_a_stage_in_front_of_its_downsampling():
    found = Stages.of(build("convnext_atto"), image_size=64)
    assert found.stem.startswith("stem")
    assert firsts(found) == [f"stages.{i}.blocks.0" for i in range(4)]
    second = found.blocks[1][0]
    assert (second.entry, second.reads, second.gives) == ("stages.1", (40, 16, 16), (80, 8, 8))
    assert found.blocks[1][1].entry == found.blocks[1][1].name


def test_a_network_of_another_library_by_its_feature_information():
    model = staged()
    found = Stages.of(model, image_size=32)
    assert firsts(found) == ["stages.0.0", "stages.1.0"] and found.image == (3, 32, 32)
    assert found.blocks[1][0].gives == (16, 4, 4)


def test_looking_changes_nothing():
    model, x = build("mobilenetv2_035").train(), images()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    Stages.of(model, image_size=64)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before[name])
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", "has no stages: blocks.0.* Block and no list of blocks"),
        (
            "swin_tiny_patch4_window7_224",
            r"passes on \[56, 56, 96\], not 96 channels first",
        ),
        ("xception41", "has no stages: its features, .*, are no neighbours"),
        ("selecsls42", "has no stages"),
        ("hrnet_w18_small", "has no stages: .* are no neighbours|it has no module"),
        ("vgg11", "has no stages: features.4.* is .* and no list of blocks"),
    ],
)
def test_networks_without_stages_are_refused(name, message):
    model = timm.create_model(name)
    with pytest.raises(ValueError, match=message):
        Stages.of(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_told_is_asked_for():
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        Stages.of("mobilenetv2_100")
    with pytest.raises(ValueError, match="this Linear has no stages: no feature_info"):
        Stages.of(nn.Linear(2, 2))
    model = build()
    model.pretrained_cfg = model.default_cfg = None
    with pytest.raises(ValueError, match="image_size must be given: this EfficientNet"):
        Stages.of(model)
    assert Stages.of(model, image_size=96).image == (3, 96, 96)
    model.feature_info = [f for f in model.feature_info if f["reduction"] < 4]
    with pytest.raises(ValueError, match="it has features of one size alone"):
        Stages.of(model, image_size=96)
    model = staged()
    model.stages[0].forward = lambda x: x  # its members do not run
    with pytest.raises(ValueError, match="does not run in its forward"):
        Stages.of(model, image_size=64)
