"""Checkpoints in the layouts that are shared, and what is no such checkpoint."""

import copy
import functools

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from memtl.models import Normalized, load_robust, timm_model
from memtl.tasks.pictures import IMAGENET_MEAN, IMAGENET_STD

ARCH = "resnet18"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))  # of norms and their statistics too
    return model.state_dict()


class InputNormalize(nn.Module):
    """As robustness has it: buffers [3, 1, 1]."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("new_mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("new_std", torch.tensor(std)[:, None, None])


def of_robustness(weights, mean=(0.5, 0.25, 0.125), std=(1.0, 0.5, 2.0)) -> dict:
    """What its DataParallel(AttackerModel) saves."""
    network = torchvision.models.resnet18(num_classes=7)
    network.load_state_dict(weights)
    whole, attacker = nn.Module(), nn.Module()
    attacker.normalize, attacker.model = InputNormalize(mean, std), network
    whole.normalizer, whole.model, whole.attacker = InputNormalize(mean, std), network, attacker
    return nn.DataParallel(whole).state_dict()


def same(model, weights) -> bool:
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[n], weights[n]) for n in own)


def test_of_robustness(weights, tmp_path):
    keys = of_robustness(weights)
    assert "module.attacker.model.conv1.weight" in keys and "module.normalizer.new_mean" in keys
    checkpoint = {"model": keys, "optimizer": {"state": {}, "lr": 0.1}, "epoch": 90, "amp": "N/A"}
    torch.save(checkpoint, tmp_path / "resnet18_l2_eps3.ckpt")
    model = load_robust(tmp_path / "resnet18_l2_eps3.ckpt", ARCH, num_classes=7)
    assert type(model).__module__.startswith("timm.") and same(model, weights)
    assert model.pretrained_cfg["mean"] == (0.5, 0.25, 0.125)
    assert model.default_cfg["std"] == (1.0, 0.5, 2.0)
    assert timm_model(ARCH).pretrained_cfg["mean"] == IMAGENET_MEAN  # others keep their own
    # Behind its normalisation it gives what the checkpoint's network gives.
    cfg = model.pretrained_cfg
    whole = Normalized(model.eval(), cfg["mean"], cfg["std"])
    network = torchvision.models.resnet18(num_classes=7).eval()
    network.load_state_dict(weights)
    x = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(whole(x), network((x - mean) / std))


LAYOUTS = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "arch": ARCH},
    "parallel": lambda w: {"module." + name: x for name, x in w.items()},
    "legacy robustness": lambda w: {"state_dict": of_robustness(w), "epoch": 1},
    "behind a normalisation": lambda w: {"model." + name: x for name, x in w.items()},
    "without counters": lambda w: {n: x for n, x in w.items() if not n.endswith("tracked")},
    "half": lambda w: {n: x.half() if x.is_floating_point() else x for n, x in w.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts(weights, tmp_path, layout):
    if layout == "half":
        weights = {n: x.half().to(x.dtype) for n, x in weights.items()}
    torch.save(LAYOUTS[layout](weights), tmp_path / "c.pt")
    model = load_robust(str(tmp_path / "c.pt"), ARCH, num_classes=7)
    assert same(model, weights) and model.training
    if layout != "legacy robustness":
        assert model.pretrained_cfg["mean"] == IMAGENET_MEAN
        assert model.pretrained_cfg["std"] == IMAGENET_STD


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_either_age(weights, tmp_path, legacy):
    torch.save(weights, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    assert same(load_robust(tmp_path / "c.pt", ARCH, num_classes=7), weights)


def test_safetensors(weights, tmp_path):
    for content in (weights, of_robustness(weights)):
        save_file({n: x.clone() for n, x in content.items()}, tmp_path / "c.safetensors")
        assert same(load_robust(tmp_path / "c.safetensors", ARCH, num_classes=7), weights)
    (tmp_path / "c.safetensors").write_bytes(b"\x01" * 40)
    with pytest.raises(ValueError, match="c.safetensors is damaged"):
        load_robust(tmp_path / "c.safetensors", ARCH)


def test_another_network_of_timm(tmp_path):
    wanted = timm_model("mobilenetv2_035", num_classes=3)
    torch.save(wanted.state_dict(), tmp_path / "c.pt")
    assert same(
        load_robust(tmp_path / "c.pt", "mobilenetv2_035", num_classes=3), wanted.state_dict()
    )


def test_weights_that_do_not_fit(weights, tmp_path):
    path = tmp_path / "c.pt"
    changed = copy.copy(weights)
    del changed["layer1.0.conv1.weight"], changed["bn1.running_mean"]
    changed["fc.scale"] = changed["extra"] = torch.zeros(1)
    torch.save(changed, path)
    with pytest.raises(
        ValueError,
        match=rf"{path} does not hold the weights of resnet18: missing: bn1.running_mean, "
        "layer1.0.conv1.weight; unexpected: extra, fc.scale; of another shape: fc.bias, fc.weight$",
    ):
        load_robust(path, ARCH)
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"weights of resnet50: missing: .* and \d+ more; .* more"):
        load_robust(path)
    keys = of_robustness(weights)
    keys["module.model.fc.scale"] = keys["module.other"] = torch.zeros(1)
    torch.save({"model": keys}, path)
    with pytest.raises(ValueError, match="weights of resnet18: unexpected: fc.scale, other$"):
        load_robust(path, ARCH, num_classes=7)


def test_no_checkpoint(weights, tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match=f"there is no file {path}"):
        load_robust(path)
    for content in ([1, 2], {}, {"model": 3}, {"weight": [1.0]}, torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"{path} holds no state dict: no tensors by name"):
            load_robust(path)
    torch.save({"model": weights, "schedule": functools.partial(max, 1)}, path)
    with pytest.raises(
        ValueError, match=r"or holds objects beside its weights.*dill.*c\[.model.\]"
    ):
        load_robust(path, ARCH)
    torch.save(weights, path)
    for content in (path.read_bytes()[:5000], b"", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} (cannot be read|is damaged)"):
            load_robust(path, ARCH)
    with pytest.raises(ValueError, match="timm has no model 'resnet'"):
        torch.save(weights, path)
        load_robust(path, "resnet")
