import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from memtl import assets
from memtl.assets import pretrain
from memtl.models import Normalized
from memtl.tasks import Glyphs, Split
from memtl.tasks.digits import MEAN, STD
from memtl.training.robust import robust_accuracy

NAME = "vit_glyphs"
RECIPES = pretrain.RECIPES
INK = Glyphs(["cmr10"], normalised=False)
networks = pytest.mark.parametrize("name", [recipe.name for recipe in RECIPES.values()])


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with a copy of the two files of a shipped network."""
    for suffix in (".safetensors", ".json"):
        shutil.copy(Path(assets.__file__).with_name(NAME + suffix), tmp_path)
    return tmp_path


def rewrite_record(directory: Path, **changes) -> None:
    path = directory / f"{NAME}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def state(model: nn.Module, head: bool = True) -> dict[str, torch.Tensor]:
    """What a network consists of; without its classifier, if so wanted."""
    own = {id(p) for p in model.get_classifier().parameters()}
    everything = model.state_dict(keep_vars=True)
    return {
        key: value.detach() for key, value in everything.items() if head or id(value) not in own
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


ROBUST = [f"cnn_glyphs_{objective}" for objective in pretrain.OBJECTIVES]
NAMES = ["cnn_glyphs", *sorted(ROBUST), "vit_glyphs"]


def test_names():
    assert assets.names() == NAMES


@pytest.mark.parametrize(("name", "size"), [("vit_glyphs", 1_208_510), ("cnn_glyphs", 748_062)])
def test_shipped_network(name, size):
    model = assets.load(name)
    assert sum(p.numel() for p in model.parameters()) == size
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 62)


def test_the_default_is_the_vit():
    assert same(state(assets.load()), state(assets.load("vit_glyphs")))
    assert assets.metadata() == assets.metadata("vit_glyphs")


def test_the_cnn_has_batch_statistics():
    """Those of training: not the initial ones, and counted in int64."""
    norms = [m for m in assets.load("cnn_glyphs").modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 * 10 + 2 + 2
    steps = assets.metadata("cnn_glyphs")["steps"]
    for norm in norms:
        assert norm.num_batches_tracked.dtype == torch.int64
        assert norm.num_batches_tracked == steps
        assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
        assert norm.running_mean.abs().sum() > 0 and (norm.running_var > 0).all()


@networks
def test_shipped_files_are_small_and_as_recorded(name):
    weights = Path(assets.__file__).with_name(f"{name}.safetensors")
    assert weights.stat().st_size == assets.metadata(name)["bytes"] <= 4 * 2**20


@pytest.mark.parametrize("network", RECIPES)
def test_records_are_complete(network):
    recipe = RECIPES[network]
    record = assets.metadata(recipe.name)
    assert record["architecture"] == recipe.architecture
    assert record["steps"] == recipe.steps
    assert record["optimizer"]["learning_rate"] == recipe.learning_rate
    assert record["command"] == (
        f"python -m memtl.assets.pretrain {network} --steps {recipe.steps} "
        f"--batch-size {record['batch_size']} --seed {record['seed']}"
    )
    assert record["wall_time_seconds"] > 0 and record["threads"] >= 1
    assert {"python", "torch", "timm", "matplotlib", "pillow"} <= record["versions"].keys()
    assert not set(record["training_fonts"]) & set(record["heldout_fonts"])
    assert 0.7 < record["heldout_accuracy"] <= record["heldout_case_folded_accuracy"] < 1


def test_the_networks_learned_from_the_same_data():
    first, second = (assets.metadata(recipe.name) for recipe in RECIPES.values())
    for key in ("task", "classes", "training_fonts", "heldout_fonts", "heldout_images"):
        assert first[key] == second[key], key


@pytest.mark.slow
@networks
def test_recorded_accuracy_is_true(name):
    record = assets.metadata(name)
    scores = pretrain.evaluate(assets.load(name), Glyphs(normalised=False).heldout)
    # Another FreeType may draw a few pixels differently; a wrong figure would be far off.
    assert scores["accuracy"] == pytest.approx(record["heldout_accuracy"], abs=0.01)
    assert scores["case_folded_accuracy"] == pytest.approx(
        record["heldout_case_folded_accuracy"], abs=0.01
    )


@networks
def test_loads_are_equal_and_separate(name):
    first, second = assets.load(name), assets.load(name)
    with torch.no_grad():
        first.get_classifier().weight.zero_()
    assert second.get_classifier().weight.abs().sum() > 0
    assert same(state(first, head=False), state(second, head=False))


@pytest.mark.parametrize(("name", "width"), [("vit_glyphs", 128), ("cnn_glyphs", 512)])
def test_num_classes_replaces_the_head_only(name, width):
    whole, cut = assets.load(name), assets.load(name, num_classes=10)
    head = cut.get_classifier()
    assert isinstance(head, nn.Linear) and head.weight.shape == (10, width)
    assert head.weight.requires_grad
    assert len(state(cut, head=False)) == len(state(whole)) - 2
    assert same(state(cut, head=False), state(whole, head=False))
    # A fresh head of 62 classes is not the trained one.
    fresh = assets.load(name, num_classes=62).get_classifier()
    assert not torch.equal(fresh.weight, whole.get_classifier().weight)


@pytest.mark.parametrize("num_classes", [10.0, "10", True])
def test_num_classes_of_a_wrong_type(num_classes):
    with pytest.raises(TypeError, match="num_classes must be an int, got"):
        assets.load(num_classes=num_classes)


def test_num_classes_too_small():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        assets.load(num_classes=0)


@pytest.mark.parametrize("name", ["resnet", "../assets/vit_glyphs", "vit", ""])
def test_unknown_name_lists_the_names(name):
    with pytest.raises(ValueError, match=f"unknown network .*{re.escape(str(NAMES))}"):
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


def test_architecture_of_an_unknown_kind(copy):
    architecture = assets.metadata()["architecture"]
    rewrite_record(copy, architecture=architecture | {"kind": "resnet"})
    with pytest.raises(ValueError, match=r"kind of architecture 'resnet': .*'mobilenet_v2', 'vit'"):
        assets.load(directory=copy)
    with pytest.raises(ValueError, match="unknown kind of architecture None"):
        assets.build({"img_size": 32})


def test_building_leaves_the_record_as_it_is():
    architecture = assets.metadata("cnn_glyphs")["architecture"]
    before = json.dumps(architecture)
    assets.build(architecture)
    assert json.dumps(architecture) == before


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
@pytest.mark.parametrize("network", RECIPES)
def test_pretrain_script(network, tmp_path):
    out = tmp_path / "new" / "folder"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "memtl.assets.pretrain", network),
            *("--steps", "3", "--batch-size", "8", "--seed", "4", "--out", str(out)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    recipe = RECIPES[network]
    assert run.returncode == 0, run.stderr
    assert "held-out fonts: accuracy" in run.stdout
    assert assets.names(out) == [recipe.name] and len(list(out.iterdir())) == 2
    record = assets.metadata(recipe.name, directory=out)
    assert (record["steps"], record["batch_size"], record["seed"]) == (3, 8, 4)
    assert record["command"].endswith(f"pretrain {network} --steps 3 --batch-size 8 --seed 4")
    written, ink = state(assets.load(recipe.name, directory=out)), Glyphs(normalised=False)
    # The same seed gives the same network, and what was written is that network, bit for bit.
    assert same(written, state(pretrain.pretrain(recipe, ink, 3, 8, seed=4)))
    assert not same(written, state(pretrain.pretrain(recipe, ink, 3, 8, seed=5)))


@pytest.mark.parametrize("network", RECIPES)
def test_pretrained_parameters_survive_storage(network, tmp_path):
    """Buffers too, whatever their values: a variance may lie outside of float16."""
    recipe = RECIPES[network]
    model = pretrain.pretrain(recipe, INK, steps=1, batch_size=2, seed=0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.fill_(1e6)
            norm.num_batches_tracked.fill_(2**40 + 1)
    pretrain.write(model, {"architecture": recipe.architecture}, tmp_path, "written")
    assert same(state(assets.load("written", directory=tmp_path)), state(model))


@pytest.mark.parametrize("network", RECIPES)
def test_pretrain_keeps_the_global_random_state(network):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    pretrain.pretrain(RECIPES[network], INK, steps=1, batch_size=2, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_schedule_warms_up_then_falls_to_zero():
    factors = [pretrain.schedule(step, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[5:]))
    assert factors[100] == pytest.approx(0.0)


def test_pretraining_wants_ink():
    with pytest.raises(ValueError, match="normalised, which the network is to do"):
        pretrain.pretrain(RECIPES["cnn"], Glyphs(["cmr10"]), steps=1, batch_size=2, seed=0)


@pytest.mark.parametrize("objective", pretrain.OBJECTIVES)
def test_records_of_robust_networks(objective):
    record, start = (assets.metadata(f"cnn_glyphs{part}") for part in (f"_{objective}", ""))
    assert record["architecture"] == start["architecture"]
    assert (record["objective"], record["start"]) == (objective, "cnn_glyphs")
    assert f"pretrain cnn --objective {objective} --steps 2000" in record["command"]
    assert record["attack"] == str(pretrain.REPORTED) == "PGD-20, L-inf 0.1"
    for key in ("task", "training_fonts", "heldout_fonts", "heldout_images", "seed"):
        assert record[key] == start[key], key
    if objective == "fast":  # ten steps never broke much more than the one it trained with
        checks = record["accuracies_under_one_and_ten_steps"]
        assert len(checks) == 20 and all(0 <= own - ten <= 0.25 for own, ten in checks)


def test_robust_networks_are_robust():
    """And pay for it; as their records say, on the first of the images that those are about."""
    found = {name: assets.metadata(name) for name in ROBUST}
    robust = [found[f"cnn_glyphs_{o}"]["heldout_robust_accuracy"] for o in pretrain.OBJECTIVES]
    assert robust == sorted(robust) and robust[0] < 0.01 < 0.4 < robust[-1]
    plain = [found[f"cnn_glyphs_{o}"]["heldout_accuracy"] for o in ("pgd", "standard")]
    assert 0.8 < plain[0] < plain[1]
    heldout = Glyphs(normalised=False).heldout
    few = Split(heldout.images[::20], heldout.labels[::20])
    for name, least, most in (("standard", 0, 0.05), ("pgd", 0.3, 0.6)):
        model = Normalized(assets.load(f"cnn_glyphs_{name}"), MEAN, STD)
        assert least <= robust_accuracy(model, few, pretrain.REPORTED) <= most


@pytest.mark.slow
def test_pretraining_goes_on_from_the_shipped_network(tmp_path):
    arguments = ["--steps", "2", "--batch-size", "4", "--out", str(tmp_path)]
    pretrain.main(["cnn", "--objective", "pgd", *arguments])
    record = assets.metadata("cnn_glyphs_pgd", directory=tmp_path)
    assert record["objective_settings"]["attack"]["steps"] == 3
    moved, start = (
        state(assets.load("cnn_glyphs_pgd", directory=tmp_path)), state(assets.load("cnn_glyphs"))
    )  # fmt: skip
    weights = [key for key, value in start.items() if value.is_floating_point() and value.ndim > 1]
    assert all(0 < (moved[k] - start[k]).abs().max() < 0.01 for k in weights)


def test_objectives_are_for_the_cnn(capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["vit", "--objective", "pgd"])
    assert "--objective is for the cnn" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--steps", "--batch-size"])
def test_script_rejects_zero(flag, capsys, tmp_path):
    with pytest.raises(SystemExit):
        pretrain.main(["cnn", flag, "0", "--out", str(tmp_path)])
    assert f"argument {flag}: must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["resnet"]])
def test_script_wants_a_network(arguments, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(arguments)
    assert "vit" in (said := capsys.readouterr().err) and "cnn" in said


def test_interrupted_write_keeps_the_old_files(copy, monkeypatch):
    before = (copy / f"{NAME}.safetensors").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        pretrain.write(nn.Linear(2, 2), {"architecture": {}}, copy, NAME)
    assert (copy / f"{NAME}.safetensors").read_bytes() == before
