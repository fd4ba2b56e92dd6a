"""Folders of images: classes, splits, complaints."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from memtl.runs.data import open_data
from memtl.runs.data.splitting import stratified
from memtl.runs.networks import Wants
from tests.runs.pictures import image, number_of, write


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """A network that takes pixels in 0..1."""
    wants = Wants(size=4, mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0)
    monkeypatch.setattr("memtl.runs.data.opening.wants_of", lambda model, size: wants)


def opened(folder, **options):
    return open_data(str(folder), model="any", **options)


def numbers(samples):
    return [number_of(samples.sample(i, None)[0]) for i in range(len(samples))]


def test_classes_and_a_part_for_validation(tmp_path):
    write(tmp_path, {"cat": 10, "dog/brown": 3, "dog/black": 3, "eel": 2, ".cache": 1})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = opened(tmp_path, val_fraction=0.2)
    assert (data.classes, data.metric, data.kind) == (("cat", "dog", "eel"), "accuracy", "image")
    assert data.test is None
    both = numbers(data.train) + numbers(data.val)
    assert sorted(both) == list(range(18))
    labels = [label.item() for _, label in map(lambda i: data.val.sample(i, None), range(4))]
    assert (len(data.val), sorted(labels)) == (4, [0, 0, 1, 2])
    for samples in (data.train, data.val):
        for i in range(len(samples)):
            x, label = samples.sample(i, None)
            assert label.dtype == torch.int64 and label.shape == ()
            assert label == sum(number_of(x) >= end for end in (10, 16))
    assert numbers(opened(tmp_path, val_fraction=0.2).val) == numbers(data.val)
    others = {tuple(numbers(opened(tmp_path, val_fraction=0.2, seed=s).val)) for s in range(5)}
    assert len(others) > 1


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_splits(tmp_path, name):
    write(tmp_path, {"train/a": 3, "train/b": 1, f"{name}/a": 1, f"{name}/b": 2})
    write(tmp_path, {"test/a": 1, "test/b": 1}, first=7)
    data = opened(tmp_path)
    parts = (data.train, data.val, data.test)
    assert [numbers(part) for part in parts] == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]


def test_train_and_test_alone(tmp_path):
    write(tmp_path, {"train/a": 5, "train/b": 5, "test/a": 1, "test/b": 1})
    data = opened(tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [8, 2, 2]
    assert not set(numbers(data.val)) & {10, 11}


def test_a_class_may_be_called_test(tmp_path):
    write(tmp_path, {"test": 2, "other": 2})
    assert opened(tmp_path).classes == ("other", "test")


class Seeded(Dataset):
    """Every sample with the seed 7."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples.sample(index, 7 + index)


def test_the_same_in_every_process(tmp_path):
    write(tmp_path, {"a": 4, "b": 4})
    image(3).resize((31, 17)).save(tmp_path / "a" / "large.png")
    train = opened(tmp_path).train
    here = [train.sample(i, 7 + i)[0] for i in range(len(train))]
    copy = pickle.loads(pickle.dumps(train))
    loaded = DataLoader(Seeded(copy), batch_size=None, num_workers=2)
    assert all(torch.equal(x, y) for x, (y, _) in zip(here, loaded, strict=True))


def test_a_root(tmp_path):
    write(tmp_path, {"animals/a": 2, "animals/b": 2})
    assert opened("animals", root=tmp_path).classes == ("a", "b")


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    path = tmp_path / "train" / "a" / "000.png"
    whole = path.read_bytes()
    for content in (whole[:-28], whole[:30], b"", b"text"):
        path.write_bytes(content)
        data = opened(tmp_path)  # nothing is read before it is asked for
        with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
            data.train.sample(0, None)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="000.png"):
        data.train.sample(0, None)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({}, "has no subfolders: there must be one of images for each class"),
        ({"a": 2}, "must have at least two classes, has a"),
        ({"a": 2, "b": 0}, r"/b has no images \(.bmp, "),
        ({"a": 2, "b": 1}, "class 'b' has 1 sample: a part for validation needs two"),
        ({"a": 2, "b": 2, "": 1}, r"images outside its classes' folders \(004.png\)"),
        ({"train/a": 2, "train/b": 2, "val/a": 1}, "/val lacks b, but the classes of train are a"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1, "val/c": 1}, "/val has c, but"),
        ({"train/a": 2, "train/b": 2, "new": 1}, r"has splits \(train\) and beside them new"),
        ({"val/a": 2, "val/b": 2}, "has val, but no train"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1}, "has a split twice"),
        ({"train": 3}, "/train has images outside its classes' folders"),
    ],
)  # fmt: skip
def test_complaints(tmp_path, counts, said):
    write(tmp_path, counts)
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no folder .*nope, and no data of that name: there"
    ):
        opened(tmp_path / "nope")


def test_stratified():
    labels = [0] * 30 + [1] * 10 + [2] * 2
    train, val = stratified(labels, "abc", 0.1, seed=3)
    assert sorted(train + val) == list(range(42))
    assert [labels[i] for i in val] == [0, 0, 0, 1, 2]
    _, most = stratified(labels, "abc", 0.99, seed=3)
    assert len(most) == 29 + 9 + 1
