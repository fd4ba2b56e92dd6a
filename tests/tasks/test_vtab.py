import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memtl.tasks import ImageFiles, Split, load_digits_vtab, load_vtab, vtab
from memtl.training import Settings, evaluate, fit
from tests.helpers import write_vtab

SPLITS = ("train", "val", "trainval", "test")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_vtab(tmp_path / "eurosat")
    return tmp_path


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = root / "eurosat" / f"{name}.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_reads_the_layout(root):
    task = load_vtab(root, "eurosat", size=16, normalise="none")
    assert (task.name, task.group, task.num_classes) == ("eurosat", "specialized", 10)
    assert [len(getattr(task, name)) for name in SPLITS] == [8, 4, 12, 6]
    lines = (root / "eurosat" / "test.txt").read_text().split("\n")
    for name in SPLITS:
        split = getattr(task, name)
        images = split.images[torch.arange(len(split))]
        assert images.shape == (len(split), 3, 16, 16) and images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
    first, _, label = lines[0].rpartition(" ")
    assert " " in first and task.test.labels[0] == int(label)
    with Image.open(root / "eurosat" / first) as image:
        assert image.size == (20, 12)
        expected = image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
    assert torch.equal(task.test.images[:1][0], expected)


def test_an_image_of_one_colour_is_normalised(tmp_path):
    Image.new("L", (5, 9), 51).save(tmp_path / "grey.png")  # a fifth of 255, in every channel
    for name, (means, stds) in vtab.NORMALISATIONS.items():
        (image,) = ImageFiles([tmp_path / "grey.png"], 4, name)[:]
        wanted = [(0.2 - mean) / std for mean, std in zip(means, stds, strict=True)]
        torch.testing.assert_close(image, torch.tensor(wanted).view(3, 1, 1).expand(3, 4, 4))


def test_image_files_are_indexed_like_a_tensor(root):
    images = load_vtab(root, "eurosat", size=8, normalise="half").trainval.images
    everything = images[:]
    index = torch.tensor([3, 0, 3, -1])
    assert torch.equal(images[index], everything[index])
    assert torch.equal(images[2:7], everything[2:7])
    assert images[5:5].shape == everything[5:5].shape
    batches = zip(images.split(5), everything.split(5), strict=True)
    assert all(torch.equal(mine, its) for mine, its in batches)
    for wrong in (3, torch.tensor([0.0]), [1, 2]):
        with pytest.raises(TypeError, match="indexed by a slice or a 1-d int64 tensor"):
            images[wrong]


def test_training_images_are_decoded_once_and_shared(root):
    task = load_vtab(root, "eurosat", size=8, normalise="half")
    first = task.trainval.images[:]
    test = task.test.images[:]
    for path in (root / "eurosat" / "images").rglob("*.*"):
        path.write_bytes(b"")
    assert torch.equal(task.trainval.images[:], first)
    joined = torch.cat([task.train.images[:], task.val.images[:]])
    assert torch.equal(joined.sort(0).values, first.sort(0).values)
    assert test.isfinite().all()
    with pytest.raises(ValueError, match="cannot be read as an image"):
        task.test.images[:]


def test_the_cache_is_bounded(root, monkeypatch):
    monkeypatch.setattr(vtab, "CACHE_BYTES", 5 * 3 * 8 * 8)
    cache: dict = {}
    paths = sorted((root / "eurosat" / "images").rglob("*.png"))
    images = ImageFiles(paths, 8, "none", cache)
    assert torch.equal(images[:], images[:])
    assert len(paths) > len(cache) == 5


def test_trains_and_evaluates_as_tensors_do(root):
    task = load_vtab(root, "eurosat", size=8, normalise="imagenet")
    held = [Split(split.images[:], split.labels) for split in (task.trainval, task.test)]
    results = []
    for train, test in ((task.trainval, task.test), held):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        settings = Settings(6, 5, epoch_steps=3)
        history = fit(model, train, test, settings, progress=False)
        assert evaluate(model, test) == history.val_score
        results.append((history.losses, history.val_score))
    assert results[0] == results[1]


def test_an_unknown_dataset_has_the_classes_of_its_lists(tmp_path):
    write_vtab(tmp_path / "mine")
    task = load_vtab(tmp_path, "mine", size=8, normalise="none")
    labels = torch.cat([getattr(task, name).labels for name in SPLITS])
    assert (task.group, task.num_classes) == ("other", labels.max() + 1)


def test_what_tells_data_apart(root):
    def data(**options) -> str:
        return load_vtab(root, "eurosat", **{"size": 8, "normalise": "none", **options}).data

    assert data() == data()
    assert len({data(), data(size=9), data(normalise="half")}) == 3
    before = data()
    path = root / "eurosat" / "test.txt"
    path.write_text("\n".join(path.read_text().split("\n")[1:]))
    assert data() != before


def test_other_images_under_the_same_names_are_told_apart(root):
    folder = root / "eurosat" / "images"
    found = [load_vtab(root, "eurosat", size=8, normalise="none").data]
    for name in ("train800", "val200"):
        path = next((folder / name).iterdir())
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as many bytes
        found.append(load_vtab(root, "eurosat", size=8, normalise="none").data)
    path = next((folder / "test").iterdir())
    path.write_bytes(path.read_bytes() + b" ")
    found.append(load_vtab(root, "eurosat", size=8, normalise="none").data)
    assert len(set(found)) == 4


def test_what_a_folder_has(root, tmp_path):
    for name in ("zebra", "cifar", "apple"):
        write_vtab(root / name)
    (root / "notes").mkdir()
    (root / "cifar" / "test.txt").unlink()  # load_vtab will say so; it is not passed over
    assert vtab.datasets(root) == ["cifar", "eurosat", "apple", "zebra"]
    with pytest.raises(
        ValueError, match=r"no folder in .*notes has a list of images .train800.txt"
    ):
        vtab.datasets(root / "notes")
    with pytest.raises(FileNotFoundError, match="there is no folder .*gone"):
        vtab.datasets(tmp_path / "gone")


def test_missing_folder_and_list(root):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/svhn$"):
        load_vtab(root, "svhn", normalise="none")
    (root / "eurosat" / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no list .*/eurosat/val200.txt$"):
        load_vtab(root, "eurosat", normalise="none")


@pytest.mark.parametrize("line", ["images/train/0.png", "images/train/0.png x", " 3", "a.png -1"])
def test_a_malformed_line(root, line):
    path = root / "eurosat" / "test.txt"
    path.write_text(f"{path.read_text()}\n{line}\n")
    number = path.read_text().split("\n").index(line) + 1
    with pytest.raises(ValueError, match=f"test.txt:{number}: a line is a path, a blank and a"):
        load_vtab(root, "eurosat", normalise="none")


@pytest.mark.parametrize("name", vtab.LISTS)
def test_a_listed_image_that_does_not_exist(root, name):
    path = root / "eurosat" / f"{name}.txt"
    path.write_text("\n" + path.read_text() + "images/gone.png 1\n")
    number = len(path.read_text().split("\n")) - 1
    wanted = f"{name}.txt:{number}: there is no image .*eurosat/images/gone.png"
    with pytest.raises(FileNotFoundError, match=wanted):
        load_vtab(root, "eurosat", normalise="none")


def test_a_label_out_of_range(root):
    line = (root / "eurosat" / "test.txt").read_text().split("\n")[1]
    edit(root, "test", line, line.rpartition(" ")[0] + " 10")
    with pytest.raises(ValueError, match="test.txt:2: label 10 is out of range: eurosat has 10"):
        load_vtab(root, "eurosat", normalise="none")


def test_an_empty_list(root):
    (root / "eurosat" / "test.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="test.txt lists no image"):
        load_vtab(root, "eurosat", normalise="none")


def test_training_and_validation_images_overlap(root):
    line = (root / "eurosat" / "train800.txt").read_text().split("\n")[0]
    path = root / "eurosat" / "val200.txt"
    path.write_text(path.read_text() + line + "\n")
    image = line.rpartition(" ")[0]
    with pytest.raises(ValueError, match=f"{image} is in train800.txt and in val200.txt"):
        load_vtab(root, "eurosat", normalise="none")


def test_the_union_is_another(root):
    path = root / "eurosat" / "train800val200.txt"
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=f"together: {lines[0]} is in one alone"):
        load_vtab(root, "eurosat", normalise="none")


def test_an_unreadable_image_is_named(root):
    task = load_vtab(root, "eurosat", size=8, normalise="none")
    whole = task.test.images.paths[2]
    whole.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"{whole} cannot be read as an image: "):
        evaluate(torch.nn.Linear(8, 10), task.test)


def test_wrong_arguments(root):
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        load_vtab(root, "eurosat", size=0, normalise="none")
    with pytest.raises(ValueError, match="normalise must be one of .*'half'.*, got 'inception'"):
        load_vtab(root, "eurosat", normalise="inception")


def test_missing_pillow_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"Pillow: pip install memtl\[demo\]"):
        load_vtab(root, "eurosat", normalise="none")


def test_nineteen_datasets():
    groups: Sequence[str] = [group for group, _ in vtab.DATASETS.values()]
    assert [groups.count(group) for group in vtab.GROUPS] == [7, 4, 8]
    assert sum(count for _, count in vtab.DATASETS.values()) == 940


def test_digits_in_the_same_shape():
    task = load_digits_vtab()
    assert (task.name, task.group, task.num_classes) == ("digits", "other", 10)
    splits = [getattr(task, name) for name in SPLITS]
    assert [len(split) for split in splits] == [800, 200, 1000, 797]
    assert torch.equal(torch.cat([task.train.images, task.val.images]), task.trainval.images)
    together = torch.cat([task.trainval.images, task.test.images]).flatten(1)
    assert len(together.unique(dim=0)) == 1797  # no two digits are alike: the splits are disjoint
    for split in splits:
        assert split.images.shape == (len(split), 1, 32, 32)
        shares = split.labels.bincount(minlength=10) / len(split)
        assert (shares - 0.1).abs().max() < 0.01
    assert torch.equal(load_digits_vtab().val.images, task.val.images)
    assert load_digits_vtab(8).data != task.data
