"""``memtl predict``, and the classes of ``memtl eval``."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from memtl import runs
from memtl.cli import main
from memtl.runs.build import open_data
from memtl.runs.data.transform import Transform
from memtl.runs.networks import wants

pytest.importorskip("timm")
images = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    words = ("--model", "vit", "--data", "digits", "--steps", "5", "--batch-size", "16")
    assert main(["train", *words, "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_of_images(run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, image in zip(files, pixels, strict=True):
        images.fromarray(image).save(file)
    found = runs.predict(run, files, device="cpu")
    model = runs.load(run)
    for i, file in enumerate(files):
        with images.open(file) as image, torch.no_grad():
            chances = model(Transform(wants(model))(image, None)[None])[0].softmax(0)
        assert found[i] == {
            "input": str(file), "class": str(int(chances.argmax())),
            "probability": pytest.approx(chances.max().item(), rel=1e-5),
        }  # fmt: skip
    capsys.readouterr()
    words = [str(run), *map(str, files), "--json", str(tmp_path / "found.json")]
    assert main(["predict", *words, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{f['class']}\t{f['probability']:.4f}\t{f['input']}" for f in found]
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert runs.predict(run, [], device="cpu") == []


def test_what_is_no_image(run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("text")
    for name, said in (("text.png", "cannot be read as an image"), ("none.png", "none.png")):
        assert main(["predict", str(run), str(tmp_path / name), "--device", "cpu"]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(TypeError, match="inputs must be a list"):
        runs.predict(run, "text.png")


def test_classes(run, tmp_path, capsys):
    out = tmp_path / "score.json"
    assert main(["eval", str(run), "--device", "cpu", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    of = found["classes"]
    assert sum(each["samples"] for each in of.values()) == found["samples"]
    assert sum(each["predicted"] for each in of.values()) == found["samples"]
    right = sum(each["right"] for each in of.values())
    assert right / found["samples"] == pytest.approx(found["accuracy"]) and right > 0
    header, _, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert header.split() == ["class", "samples", "recall", "predicted", "precision"]
    first = of["0"]
    cells = rows[0].split()
    assert cells[:2] == ["0", str(first["samples"])] and len(rows) == 10
    assert cells[2] == f"{first['right'] / first['samples']:.4f}"


def test_of_texts(tmp_path):
    pytest.importorskip("transformers")
    settings = runs.RunSettings(model="bert", data="kind", steps=1, batch_size=4, device="cpu",
                                tokens=16)  # fmt: skip
    out = tmp_path / "run"
    data = _few(settings)
    runs.train(settings, out, say=None, data=data)
    texts = ["Open a file.", "Return a number.", "Open a file."]
    found = runs.predict(out, texts, device="cpu")
    assert [each["input"] for each in found] == texts and found[0] == found[2] != found[1]
    assert all(each["class"] in data.classes for each in found)


def _few(settings):
    data = open_data(settings)

    class First:
        def __init__(self, samples):
            self.sample = samples.sample

        def __len__(self):
            return 8

    return dataclasses.replace(data, train=First(data.train), val=First(data.val), test=None)
