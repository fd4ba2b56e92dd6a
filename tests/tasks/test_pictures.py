"""CIFAR and SVHN from files made up in the formats on disk, whose own md5 sums are checked."""

import hashlib
import pickle
import sys

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision.datasets

from memtl.models import Normalized
from memtl.tasks import Split, load_pictures
from memtl.tasks.pictures import DATASETS, IMAGENET_MEAN, IMAGENET_STD, VALIDATION, Pixels
from memtl.training import evaluate

TRAIN, TEST = VALIDATION + 20, 30


def written(path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The three datasets, and what is in them by name: images [n, 3, 32, 32] and labels."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    patch = pytest.MonkeyPatch()
    held = {}

    def draw(n, classes):
        return random.integers(0, 256, (n, 3, 32, 32), np.uint8), random.integers(0, classes, n)

    for dataset, parts, key in (("cifar10", 5, "labels"), ("cifar100", 1, "fine_labels")):
        kind = getattr(torchvision.datasets, DATASETS[dataset][0])
        train, test = draw(TRAIN, DATASETS[dataset][1]), draw(TEST, DATASETS[dataset][1])
        held[dataset] = train, test
        folder = root / kind.base_folder

        def batch(images, labels, folder=folder, key=key, *, name):
            entry = {"data": images.reshape(len(images), -1), key: labels.tolist()}
            if key == "fine_labels":
                entry["coarse_labels"] = [0] * len(labels)
            return [name, written(folder / name, pickle.dumps(entry, protocol=2))]

        cut = [np.array_split(x, parts) for x in train]
        names = [name for name, _ in kind.train_list]
        listed = [batch(*part, name=n) for *part, n in zip(*cut, names, strict=True)]
        patch.setattr(kind, "train_list", listed)
        patch.setattr(kind, "test_list", [batch(*test, name=kind.test_list[0][0])])
        meta = pickle.dumps({kind.meta["key"]: ["a", "b"]})
        md5 = written(folder / kind.meta["filename"], meta)
        patch.setattr(kind, "meta", {**kind.meta, "md5": md5})

    svhn, listed = torchvision.datasets.SVHN, {}
    held["svhn"] = []
    for part, n in (("train", TRAIN), ("test", TEST)):
        images, labels = draw(n, 10)
        held["svhn"].append((images, labels))
        url, name, _ = svhn.split_list[part]
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]  # 0 is class 10 there
        scipy.io.savemat(root / name, {"X": images.transpose(2, 3, 1, 0), "y": digits})
        listed[part] = [url, name, hashlib.md5((root / name).read_bytes()).hexdigest()]
    patch.setattr(svhn, "split_list", {**svhn.split_list, **listed})
    yield root, held
    patch.undo()


@pytest.mark.parametrize("dataset", DATASETS)
def test_reads_the_files(root, dataset):
    root, held = root
    task = load_pictures(root, dataset)
    (images, labels), test = held[dataset]
    assert (task.name, task.num_classes, task.metric) == (dataset, DATASETS[dataset][1], "accuracy")
    cut = len(labels) - VALIDATION
    for split, wanted in (
        (task.train, (images[:cut], labels[:cut])),
        (task.val, (images[cut:], labels[cut:])),
        (task.test, test),
    ):
        assert len(split) == len(split.images) == len(wanted[1])
        assert split.labels.dtype == torch.int64 and split.labels.tolist() == wanted[1].tolist()
        assert split.images.pixels.dtype == torch.uint8 and split.images.pixels.is_contiguous()
        found = split.images[:]
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.from_numpy(wanted[0]).float() / 255)
    whole = task.train.images.pixels.untyped_storage()
    assert whole.data_ptr() == task.val.images.pixels.untyped_storage().data_ptr()  # kept once


def test_of_another_size(root):
    root, held = root
    for size in (48, 20):
        images = load_pictures(root, "svhn", size=size).test.images
        exact = torch.from_numpy(held["svhn"][1][0]).double() / 255
        wanted = F.interpolate(exact, size=(size, size), mode="bilinear", antialias=True)
        torch.testing.assert_close(images[:].double(), wanted, atol=1e-5, rtol=0)
        assert 0 <= images[:].min() and images[:].max() <= 1


def test_pixels_are_indexed_like_a_tensor():
    images = Pixels(torch.randint(256, (7, 3, 4, 6), dtype=torch.uint8), 6)
    everything = images[:]
    assert everything.shape == (7, 3, 6, 6)
    index = torch.tensor([3, 0, 3, -1])
    assert torch.equal(images[index], everything[index])
    assert torch.equal(images[2:5], everything[2:5])
    assert images[5:5].shape == (0, 3, 6, 6)
    assert images[index[:0]].shape == (0, 3, 6, 6)
    batches = zip(images.split(3), everything.split(3), strict=True)
    assert all(torch.equal(mine, its) for mine, its in batches)
    kept = images.pixels.clone()
    images[:].zero_()
    assert torch.equal(images.pixels, kept)
    for wrong in (3, torch.tensor([0.0]), [1, 2], torch.tensor([True] * 7)):
        with pytest.raises(TypeError, match="indexed by a slice or a 1-d int64 tensor"):
            images[wrong]
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        Pixels(kept, 0)


def test_a_network_of_imagenet_reads_them(root):
    task = load_pictures(root[0], "cifar10", size=8)
    inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    model = Normalized(inner, IMAGENET_MEAN, IMAGENET_STD)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = Split((task.test.images[:] - mean) / std, task.test.labels)
    assert evaluate(model, task.test, batch_size=7) == evaluate(inner, normalised)


@pytest.mark.parametrize(
    ("dataset", "file", "where"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3", "cifar-10-python.tar.gz unpacks to"),
        ("cifar10", "cifar-10-batches-py/batches.meta", "cifar-10-python.tar.gz unpacks to"),
        ("cifar100", "cifar-100-python/test", "cifar-100-python.tar.gz unpacks to"),
        ("svhn", "test_32x32.mat", "train_32x32.mat and http.*test_32x32.mat"),
    ],
)
def test_missing_and_damaged_files(root, dataset, file, where):
    root, _ = root
    path = root / file
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"^{path} is not what was published.*{where}"):
            load_pictures(root, dataset)
        path.unlink()
        with pytest.raises(
            FileNotFoundError, match=f"{dataset} belongs in {root}: .*{where}.* there is no {path}$"
        ):
            load_pictures(root, dataset)
    finally:
        path.write_bytes(content)
    assert len(load_pictures(root, dataset).test) == TEST


def test_an_empty_folder_names_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*data_batch_1, .*batches.meta"):
        load_pictures(tmp_path / "gone", "cifar10")


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="one of cifar10, cifar100, svhn, got 'mnist'"):
        load_pictures(tmp_path, "mnist")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"svhn needs torchvision and scipy: pip install memtl"):
        load_pictures(tmp_path, "svhn")
