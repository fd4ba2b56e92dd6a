import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from memtl import assets
from memtl.assets import pretrain_vit
from memtl.tasks import Glyphs

NAME = "vit_glyphs"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with a copy of the two files of the shipped network."""
    for suffix in (".safetensors", ".json"):
        shutil.copy(Path(assets.__file__).with_name(NAME + suffix), tmp_path)
    return tmp_path


def rewrite_record(directory: Path, **changes) -> None:
    path = directory / f"{NAME}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shipped_network():
    assert assets.names() == [NAME]
    model = assets.load()
    assert sum(p.numel() for p in model.parameters()) == 1_208_510
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 62)


def test_shipped_weights_are_small():
    weights = Path(assets.__file__).with_name(f"{NAME}.safetensors")
    assert weights.stat().st_size == assets.metadata()["bytes"] <= 4 * 2**20


@pytest.mark.slow
def test_recorded_accuracy_is_true():
    record = assets.metadata()
    scores = pretrain_vit.evaluate(assets.load(), Glyphs().heldout)
    # Another FreeType may draw a few pixels differently; a wrong figure would be far off.
    assert scores["accuracy"] == pytest.approx(record["heldout_accuracy"], abs=0.01)
    assert scores["case_folded_accuracy"] == pytest.approx(
        record["heldout_case_folded_accuracy"], abs=0.01
    )


def test_loads_are_equal_and_separate():
    first, second = assets.load(), assets.load()
    with torch.no_grad():
        first.head.weight.zero_()
    assert second.head.weight.abs().sum() > 0
    assert torch.equal(first.pos_embed, second.pos_embed)


def test_num_classes_replaces_the_head_only():
    whole, cut = assets.load(), assets.load(num_classes=10)
    assert cut.head.weight.shape == (10, 128)
    assert isinstance(cut.head, nn.Linear) and cut.head.weight.requires_grad
    kept = {key: value for key, value in cut.state_dict().items() if not key.startswith("head.")}
    assert len(kept) == len(whole.state_dict()) - 2
    for key, value in kept.items():
        assert torch.equal(value, whole.state_dict()[key]), key
    # A fresh head of 62 classes is not the trained one.
    assert not torch.equal(assets.load(num_classes=62).head.weight, whole.head.weight)


@pytest.mark.parametrize("num_classes", [10.0, "10", True])
def test_num_classes_of_a_wrong_type(num_classes):
    with pytest.raises(TypeError, match="num_classes must be an int, got"):
        assets.load(num_classes=num_classes)


def test_num_classes_too_small():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        assets.load(num_classes=0)


@pytest.mark.parametrize("name", ["resnet", "../assets/vit_glyphs", ""])
def test_unknown_name_lists_the_names(name):
    with pytest.raises(ValueError, match=r"unknown network .*\['vit_glyphs'\]"):
        assets.load(name)


def test_empty_directory(tmp_path):
    with pytest.raises(ValueError, match=r"unknown network 'vit_glyphs': .* has \[\]"):
        assets.load(directory=tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "longer"])
def test_damaged_weights(copy, damage):
    path = copy / f"{NAME}.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    content = {"truncated": content[:-100], "empty": b"", "longer": content + b"\0"}.get(
        damage, content
    )
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged, truncated or altered.*sha256") as caught:
        assets.load(directory=copy)
    assert str(path) in str(caught.value)


def test_not_safetensors_at_all(copy):
    content = b"not a checkpoint"
    (copy / f"{NAME}.safetensors").write_bytes(content)
    rewrite_record(copy, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ValueError, match=r"vit_glyphs\.safetensors does not hold the weights"):
        assets.load(directory=copy)


def test_weights_of_another_architecture(copy):
    architecture = assets.metadata()["architecture"]
    rewrite_record(copy, architecture=architecture | {"depth": 5})
    with pytest.raises(ValueError, match=r"does not hold the weights[\s\S]*blocks\.5"):
        assets.load(directory=copy)
    rewrite_record(copy, architecture=architecture | {"embed_dim": 64})
    with pytest.raises(ValueError, match=r"does not hold the weights[\s\S]*size mismatch"):
        assets.load(directory=copy)


@pytest.mark.parametrize("content", ['{"architecture": {', "[]", '{"sha256": "0"}', "\xff"])
def test_damaged_record(copy, content):
    (copy / f"{NAME}.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"vit_glyphs\.json is damaged"):
        assets.load(directory=copy)


def test_missing_weights(copy):
    (copy / f"{NAME}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vit_glyphs\.safetensors"):
        assets.load(directory=copy)


@pytest.mark.parametrize("missing", ["timm.models", "safetensors"])
def test_missing_package_names_the_extra(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install memtl\[demo\]"):
        assets.load()


@pytest.mark.slow
def test_pretrain_script(tmp_path):
    out = tmp_path / "new" / "folder"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "memtl.assets.pretrain_vit"),
            *("--steps", "3", "--batch-size", "8", "--seed", "4", "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "held-out fonts: accuracy" in run.stdout
    assert sorted(path.name for path in out.iterdir()) == [f"{NAME}.json", f"{NAME}.safetensors"]
    record = assets.metadata(directory=out)
    assert (record["steps"], record["batch_size"], record["seed"]) == (3, 8, 4)
    assert "--steps 3 --batch-size 8 --seed 4" in record["command"]
    written = assets.load(directory=out)
    # The same seed gives the same weights; the figures are those of the weights as stored.
    again = pretrain_vit.pretrain(Glyphs(), steps=3, batch_size=8, seed=4)
    for key, value in again.state_dict().items():
        assert torch.allclose(written.state_dict()[key], value, atol=1e-3), key
    other = pretrain_vit.pretrain(Glyphs(), steps=3, batch_size=8, seed=5)
    assert not torch.allclose(written.head.weight, other.head.weight, atol=1e-3)


def test_pretrain_keeps_the_global_random_state():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    pretrain_vit.pretrain(Glyphs(["cmr10"]), steps=1, batch_size=2, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_schedule_warms_up_then_falls_to_zero():
    factors = [pretrain_vit.schedule(step, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[5:]))
    assert factors[100] == pytest.approx(0.0)


@pytest.mark.parametrize("flag", ["--steps", "--batch-size"])
def test_script_rejects_zero(flag, capsys, tmp_path):
    with pytest.raises(SystemExit):
        pretrain_vit.main([flag, "0", "--out", str(tmp_path)])
    assert f"argument {flag}: must be at least 1, got 0" in capsys.readouterr().err


def test_interrupted_write_keeps_the_old_files(copy, monkeypatch):
    before = (copy / f"{NAME}.safetensors").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        pretrain_vit.write(nn.Linear(2, 2), {"architecture": {}}, copy, NAME)
    assert (copy / f"{NAME}.safetensors").read_bytes() == before
