"""``memtl vtab``."""

import argparse
import dataclasses
import json
from xml.etree import ElementTree

import pytest
import torch

import memtl
from memtl.cli import main
from memtl.tasks import Split, VtabTask, load_digits_vtab, load_vtab
from memtl.tasks.vtab import DATASETS
from memtl.training import evaluate
from memtl.vtab import Backbone, Caches, Grid, Method, command, methods
from tests.helpers import write_vtab

pytest.importorskip("timm")
pytest.importorskip("matplotlib")

SMALL = ["--model", "test_vit", "--size", "32"]


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setenv("MEMTL_PROGRESS", "0")


@pytest.fixture
def root(tmp_path):
    for name in ("eurosat", "svhn", "mine"):
        write_vtab(tmp_path / "data" / name)
    return tmp_path / "data"


def few_digits(size: int) -> VtabTask:
    """The digits, with fewer to evaluate on."""
    task = load_digits_vtab(size)
    few = {
        n: Split(s.images[:60], s.labels[:60]) for n, s in (("val", task.val), ("test", task.test))
    }
    return dataclasses.replace(task, **few)


def test_on_the_digits_with_the_shipped_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_digits_vtab", few_digits)
    arguments = ["vtab", "--quick", "--methods", "linear probe", "--output", str(tmp_path)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "vtab.json").read_text())
    assert record["command"] == "memtl vtab --quick --methods 'linear probe' --output " + str(
        tmp_path
    )
    (found,) = record["outcomes"]
    assert (found["dataset"], found["method"]) == ("digits", "linear probe")
    assert len(found["accuracies"]) == 2 and found["mean"] > 0.6
    assert record["costs"]["linear probe"]["trainable"] == 128 * 10 + 10
    assert record["datasets"]["digits"]["trainval"] == 1000
    assert record["measured"] == {"dataset": "digits", "batch": 128, "rounds": 2}
    assert "mean of the 1 dataset run" in text and "a quick run" in text


def test_on_a_folder(root, tmp_path, capsys):
    output = tmp_path / "found"
    names = ["linear probe", "full fine-tuning"]
    arguments = ["vtab", "--quick", *SMALL, "--data", str(root), "--normalise", "half"]
    arguments += ["--methods", *names]
    assert main([*arguments, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    record = json.loads((output / "vtab.json").read_text())
    assert [*record["datasets"]] == ["svhn", "eurosat", "mine"]
    assert record["datasets"]["mine"]["classes"] == 3
    assert record["datasets"]["mine"]["classes_from"] == "the largest label, and one more"
    assert record["datasets"]["svhn"]["classes"] == 10
    assert [(o["dataset"], o["method"]) for o in record["outcomes"]] == [
        (d, m) for d in record["datasets"] for m in names
    ]
    costs = record["costs"]
    assert costs[names[0]]["saved_bytes"] < costs[names[1]]["saved_bytes"]
    assert costs[names[0]]["trainable"] < costs[names[1]]["trainable"]
    assert "mean of the 3 datasets run" in record["means"]

    page = (output / "vtab.html").read_text(encoding="utf-8")
    shown = "".join(ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n")).itertext())
    for label in (*DATASETS, *names, "mine", *record["means"], "missing"):
        assert label in text and label in shown
    assert record["command"] in shown and page.count("<svg") == 1
    stripped = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http://" not in stripped and "https://" not in stripped

    # Again: nothing is trained, and the same is found.
    before = (output / "runs.jsonl").read_bytes()
    (output / "runs.jsonl").write_bytes(before + b'{"key"')
    assert main([*arguments, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert f"runs.jsonl has {3 * 2 * 4} finished trainings" in text
    assert "ignored a last line cut short, of 6 bytes" in text
    assert (output / "runs.jsonl").read_bytes() == before
    assert json.loads((output / "vtab.json").read_text())["outcomes"] == record["outcomes"]


def test_every_method_on_a_folder(root, tmp_path, capsys):
    arguments = ["vtab", "--quick", *SMALL, "--data", str(root), "--normalise", "half"]
    arguments += ["--datasets", "mine", "--seeds", "1", "--weight-decays", "0.001", "--save"]
    assert main([*arguments, "--output", str(tmp_path / "o")]) == 0
    record = json.loads((tmp_path / "o" / "vtab.json").read_text())
    found = {o["method"]: o for o in record["outcomes"]}
    assert {"Head2Toe", "VQT", "VPT-deep", "AdaptFormer", "VQT + AdaptFormer"} < set(found)
    assert all(o["mean"] is not None and o["chosen"][1] == 0.001 for o in found.values())
    kept = {name: cost["saved_bytes"] for name, cost in record["costs"].items()}
    assert kept["linear probe"] < kept["Head2Toe"] < kept["VQT"] < kept["AdaptFormer"]
    assert kept["VQT + AdaptFormer (4 bits)"] < 0.7 * kept["VQT + AdaptFormer"]
    assert len(list((tmp_path / "o" / "cache").iterdir())) == 3  # train, val, trainval
    size = sum(path.stat().st_size for path in (tmp_path / "o" / "cache").glob("*/*"))
    assert record["caches"] == {"folder": str(tmp_path / "o" / "cache"), "bytes": size}
    assert f"caches: {tmp_path / 'o' / 'cache'}, {size / 2**30:.3g} GiB" in capsys.readouterr().out
    assert record["left_out"] == {}

    saved = tmp_path / "o" / "models" / "mine"
    assert {"vqt-1", "vqt-half-kept-1", "vqt-adaptformer-4-bits-1", "vqt-lora-1"} < {
        path.name for path in saved.iterdir()
    }
    task = load_vtab(root, "mine", normalise="half", size=32)
    model = Backbone("test_vit", size=32).build(1000, 7)
    memtl.load(model, saved / "vqt-half-kept-1")
    assert evaluate(model, task.test) == found["VQT (half kept)"]["accuracies"][0]
    assert model.get_classifier().linear.weight.shape == (3, (64 + 6 * 64) // 2)


def test_choices(root, tmp_path, capsys):
    arguments = [
        "vtab", *SMALL, "--data", str(root), "--normalise", "none", "--datasets", "mine",
        "--methods", "linear probe", "--epochs", "2", "--batch-size", "5", "--seeds", "7",
        "--search-seed", "3", "--grid", "lr=.5,1,wd=0", "--output", str(tmp_path / "o"),
    ]  # fmt: skip
    assert main(arguments) == 0
    record = json.loads((tmp_path / "o" / "vtab.json").read_text())
    assert record["protocol"] == {"epochs": 2, "batch_size": 5, "seeds": [7], "search_seed": 3}
    assert record["grids"] == {"linear probe": {"learning_rates": [0.5, 1], "weight_decays": [0]}}
    keys = [
        json.loads(line)["key"] for line in (tmp_path / "o" / "runs.jsonl").read_text().splitlines()
    ]
    assert [(k["phase"], k["seed"]) for k in keys] == [("search", 3), ("search", 3), ("final", 7)]
    assert {(k["model"], k["weights"], k["epochs"], k["batch_size"]) for k in keys} == {
        ("test_vit", "random", 2, 5)
    }
    assert "random weights" in capsys.readouterr().out


def test_grids_of_different_sizes_are_not_compared(monkeypatch, tmp_path, capsys):
    def build(classes, seed):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, classes))

    two = [Method("a", build), Method("b", build, Grid((1.0,), (0.0,)))]
    monkeypatch.setattr(command, "methods", lambda backbone, cache: two)
    arguments = ["vtab", "--quick", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "grids of one size, not a 20, b 1: give --grid" in capsys.readouterr().err
    assert main([*arguments, "--grid", "lr=.01,wd=0"]) == 0
    assert "mean of the 1 dataset run" in capsys.readouterr().out
    assert (tmp_path / "vtab.html").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("limit", "said"),
    [("0", ""), ("1e-9", "a cache for 8 images would be 0.0001"), ("9", None)],
)
def test_caches_are_bounded(root, tmp_path, capsys, limit, said):
    arguments = ["vtab", "--quick", *SMALL, "--data", str(root), "--normalise", "half"]
    arguments += ["--datasets", "mine", "--methods", "VQT", "--cache-gib", limit]
    assert main([*arguments, "--output", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "o" / "cache").exists() == (f"caches: {tmp_path}" in text) == (said is None)
    assert (said or "") in text and text.count("a cache for") == (3 if said else 0)


def test_another_network_in_the_same_folder(root, tmp_path):
    checkpoint = tmp_path / "other.pt"
    state = Backbone("test_vit", size=32).build(3, 0).state_dict()
    torch.save(state | {"cls_token": state["cls_token"] + 1}, checkpoint)
    arguments = ["vtab", "--quick", "--data", str(root), "--normalise", "half", "--size", "32"]
    arguments += ["--datasets", "mine", "--methods", "VQT", "--output", str(tmp_path / "o")]
    found = []
    for network in (["test_vit"], ["test_vit2"], ["test_vit", "--checkpoint", str(checkpoint)]):
        assert main([*arguments, "--model", *network]) == 0
        found.append(len(list((tmp_path / "o" / "cache").iterdir())))
    assert found == [3, 6, 9]


class Raising(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("kind", [ImportError, NotImplementedError, TypeError, ValueError])
def test_a_method_that_cannot_serve_the_network_is_left_out(monkeypatch, tmp_path, capsys, kind):
    def build(classes, seed):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, classes))

    wrong = Method("b", lambda classes, seed: Raising(kind("not\n  here")))
    monkeypatch.setattr(command, "load_digits_vtab", few_digits)
    monkeypatch.setattr(command, "methods", lambda backbone, caches: [Method("a", build), wrong])
    arguments = ["vtab", "--quick", "--output", str(tmp_path / "o")]
    assert main([*arguments, "--methods", "a", "b"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "memtl vtab: --methods b: not here\n")
    assert not (tmp_path / "o").exists()
    assert main(arguments) == 0
    assert "left out: b: not here\n" in capsys.readouterr().out
    record = json.loads((tmp_path / "o" / "vtab.json").read_text())
    assert record["left_out"] == {"b": "not here"} and [*record["costs"]] == ["a"]
    assert "b was left out: not here" in (tmp_path / "o" / "vtab.html").read_text()

    monkeypatch.setattr(command, "methods", lambda backbone, caches: [wrong])
    assert main(arguments) == 2
    assert capsys.readouterr().err == "memtl vtab: no method can train vit_glyphs\n"


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("test_vit", []),
        ("test_resnet", []),
        ("vit_relpos_small_patch16_224", ["VPT-deep"]),
        (
            "xcit_nano_12_p8_224",
            ["VQT", "VQT (half kept)", "VQT + AdaptFormer", "VQT + AdaptFormer (4 bits)"],
        ),
    ],
)
def test_what_serves_a_network(name, left_out, tmp_path, capsys):
    backbone = Backbone(name, size=32)
    without_peft = [m for m in methods(backbone, Caches(tmp_path)) if "LoRA" not in m.name]
    options = argparse.Namespace(methods=None, device="cpu")
    chosen, found = command._served(without_peft, backbone, options)
    assert [*found] == left_out and all(found.values())
    assert [m for m in without_peft if m.name not in found] == chosen
    assert capsys.readouterr().out.count("left out: ") == len(left_out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "/no/such"], "--data needs --normalise (imagenet, half, none)"),
        (["--data", "/no/such", "--normalise", "half", *SMALL], "there is no folder /no/such"),
        (["--normalise", "half"], "--normalise is for the images of --data"),
        (["--datasets", "dtd"], "--datasets is for the images of --data"),
        (["--data", "/", "--normalise", "half"], "vit_glyphs takes images of 1 channel"),
        (["--model", "nope"], "timm has no model 'nope'"),
        (["--model", "test_vit", "--checkpoint", "/no/such.pt"], "there is no checkpoint /no/such"),
        (["--methods", "magic"], "--methods magic: unknown, known are linear probe, Head2Toe"),
        (["--size", "0", "--model", "test_vit"], "size must be at least 1 pixel, got 0"),
        (["--cache-gib", "-1"], "--cache-gib must be at least 0, got -1"),
        (["--cache-gib", "nan"], "--cache-gib must be at least 0, got nan"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--seeds", "1", "1"], "seeds must be one or more, each once"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
    ],
)
def test_what_is_wrong_is_said(arguments, said, tmp_path, capsys):
    assert main(["vtab", *arguments, "--output", str(tmp_path / "o")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("memtl vtab: ") and said in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("grid", ["lr=1", "lr=1,wd=x", "1,wd=0", "lr=0,wd=0", "lr=1,wd=0,mom=1"])
def test_a_wrong_grid(grid, capsys):
    with pytest.raises(SystemExit) as error:
        main(["vtab", "--grid", grid])
    assert error.value.code == 2
    assert f"'{grid}' is not like lr=1,.5,wd=1e-3,0" in capsys.readouterr().err


def test_wrong_data_end_it_with_one_line(root, tmp_path, capsys):
    arguments = ["vtab", "--quick", *SMALL, "--data", str(root), "--normalise", "half"]
    arguments += [
        "--output",
        str(tmp_path / "o"),
        "--methods",
        "linear probe",
        "--datasets",
        "mine",
    ]
    broken = sorted((root / "mine" / "images" / "test").iterdir())[0]
    broken.write_bytes(b"no image")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert f"memtl vtab: {broken} cannot be read as an image" in err and err.count("\n") == 1
    assert len((tmp_path / "o" / "runs.jsonl").read_text().splitlines()) == 2, "the search is kept"
    broken.unlink()
    assert main(arguments) == 2
    assert "test.txt:1: there is no image" in capsys.readouterr().err
