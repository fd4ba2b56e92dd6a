"""What a newcomer does first: from a folder of pictures to a model in use; nothing is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memtl.cli import main
from memtl.runs.folder import SUMMARY

pytest.importorskip("timm")

CLASSES = ("dark", "light")
RUN = "runs/cnn-photos-bitfit"
ROTATED = 6
"""How a camera says that it was held on its side."""


def draw(folder: Path, count: int, seed: int) -> None:
    """Pictures of many sizes, in colour and grey, PNG and JPEG, one of them on its side."""
    rng = np.random.default_rng(seed)
    for name, low in zip(CLASSES, (0, 170), strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(20, 70, 2)
            shape = (height, width) if i % 3 == 0 else (height, width, 3)
            picture = Image.fromarray(rng.integers(low, low + 80, shape, dtype=np.uint8))
            exif = Image.Exif()
            exif[0x0112] = ROTATED if i == 1 else 1
            picture.save(folder / name / f"{i}.{'png' if i % 2 == 0 else 'jpg'}", exif=exif)
    (folder / CLASSES[0] / "notes.txt").write_text("no picture")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Photos, other photos, and a run on the first, made as the command line does it."""
    place = tmp_path_factory.mktemp("first")
    draw(place / "photos", 12, 0)
    draw(place / "others", 5, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = ("--model", "cnn", "--data", "photos", "--method", "bitfit", "--device", "cpu")
        assert main(["train", *words, "steps=12", "batch_size=8", "learning_rate=3e-2"]) == 0
    return place


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def test_eval_takes_all_of_another_folder(capsys):
    assert main(["eval", RUN, "--data", "others", "--json", "score.json", "--device", "cpu"]) == 0
    found = json.loads(Path("score.json").read_text())
    assert (found["split"], found["samples"]) == ("all", 10)
    assert found["accuracy"] == 1.0
    assert main(["eval", RUN, "--device", "cpu"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    said = dict(line for line in lines if len(line) == 2)
    assert (said["split"], said["samples"]) == ("val", "2")


def test_predict_takes_a_folder(capsys):
    words = ("--device", "cpu", "--json", "said.json")
    assert main(["predict", RUN, "others", *words]) == 0
    files = sorted(str(p) for p in Path("others").rglob("*.[pj]*g"))
    said = json.loads(Path("said.json").read_text())
    assert [each["input"] for each in said] == files and len(files) == 10
    assert [each["class"] for each in said] == [Path(file).parent.name for file in files]
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", RUN, "runs"], "runs has no images"),
        (["predict", RUN, "none.png"], "none.png"),
        (["predict", RUN, "others/dark/notes.txt"], "cannot be read as an image"),
        (["predict", "others", "photos"], "others is no run's folder"),
        (["train", "--model", "cnn", "--data", "photo"], "do you mean photos?"),
        (["train", "--model", "cnm", "--data", "photos"], "do you mean cnn, which ships"),
    ],
)
def test_a_wrong_call_is_one_line(words, said, capsys):
    assert main(words) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"memtl {words[0]}: ") and said in captured
    assert len(captured.splitlines()) == 1


def test_a_call_that_failed_before_it_trained_binds_nothing():
    words = ["train", "--model", "vit", "--data", "photos", "steps=1", "--device", "cpu"]
    assert main([*words, "--size", "64"]) == 2  # the shipped vit takes 32 alone
    assert main(words) == 0
    assert Path("runs/vit-photos-full", SUMMARY).exists()
