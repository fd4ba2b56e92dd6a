"""Data by name: what ships, torchvision's files, Hugging Face's tables; and options."""

import struct

import numpy as np
import pytest
import torch

from memtl.runs.data import open_data
from memtl.runs.networks import Wants, create, wants
from memtl.tasks import docstrings, load_digits
from memtl.tasks.text import encode
from tests.runs.pictures import image, number_of

ENCODER = wants("bert")
PIXELS = Wants(size=6, mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0)


@pytest.fixture
def pixels(monkeypatch):
    """The network "pixels" takes pixels in 0..1."""
    monkeypatch.setattr("memtl.runs.data.opening.wants_of", lambda model, size: PIXELS)


def inputs(samples, count=10):
    return torch.stack([samples.sample(i, None)[0] for i in range(min(count, len(samples)))])


def labels(samples):
    return [samples.sample(i, None)[1].item() for i in range(len(samples))]


def test_digits_are_those_of_the_task():
    data, task = open_data("digits", model="vit"), load_digits()
    for ours, theirs in ((data.train, task.train), (data.val, task.val), (data.test, task.test)):
        assert len(ours) == len(theirs)
        torch.testing.assert_close(inputs(ours), theirs.images[:10])
        assert labels(ours)[:10] == theirs.labels[:10].tolist()
    assert torch.equal(data.train.sample(0, 1)[0], data.train.sample(0, None)[0])
    assert data.classes == tuple("0123456789")


def test_digits_for_another_network():
    data = open_data("digits", model=create("resnet18", num_classes=10, pretrained=False), size=40)
    assert data.train.sample(3, None)[0].shape == (3, 40, 40)
    model = torch.nn.Conv2d(1, 2, 3)
    assert open_data("digits", model=model, size=20).val.sample(0, None)[0].shape == (1, 20, 20)


def test_docstrings_are_those_of_the_task():
    data = open_data("kind", model="bert", tokens=32)
    expected = docstrings.texts("kind", "val")
    coded = encode(ENCODER.tokenizer, expected.texts[:10], 32)
    assert data.kind == "text" and data.classes == ("module", "class", "function", "method")
    assert len(data.test) == len(docstrings.texts("kind", "test").labels)
    assert torch.equal(inputs(data.val)[:, : coded.shape[1]], coded)
    few = [data.val.sample(i, None)[1].item() for i in range(50)]
    assert few == list(expected.labels[:50])
    ids, _ = open_data("pair").train.sample(0, None)
    assert ids.shape == (128,) and (ids == ENCODER.tokenizer.sep_token_id).sum() == 2


def idx(array) -> bytes:
    """The format of MNIST's files."""
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist(root, train, test):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        digits = np.arange(count)
        images = np.broadcast_to(digits[:, None, None], (count, 28, 28))
        for kind, array in (("images-idx3", images), ("labels-idx1", digits % 10)):
            (folder / f"{name}-{kind}-ubyte").write_bytes(idx(array))


def test_of_torchvision(tmp_path, pixels):
    pytest.importorskip("torchvision")
    write_mnist(tmp_path, 50, 20)
    data = open_data("torchvision:MNIST", model="pixels", root=tmp_path, val_fraction=0.2)
    assert [len(part) for part in (data.train, data.val, data.test)] == [40, 10, 20]
    assert data.classes[:2] == ("0 - zero", "1 - one")
    for samples in (data.train, data.val, data.test):
        for i in range(len(samples)):
            x, label = samples.sample(i, None)
            assert x.shape == (3, 6, 6) and number_of(x) % 10 == label


def test_of_torchvision_by_splits(tmp_path, pixels):
    """FGVCAircraft's lists: train, val and test, and images that its own folders have."""
    pytest.importorskip("torchvision")
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "variants.txt").write_text("A\nB\n")
    for first, split in ((0, "train"), (10, "val"), (20, "test")):
        rows = [f"{first + i:07} {'AB'[i % 2]}" for i in range(4)]
        (folder / f"images_variant_{split}.txt").write_text("\n".join(rows) + "\n")
        for i in range(4):
            image(first + i).save(folder / "images" / f"{first + i:07}.jpg")
    data = open_data("torchvision:FGVCAircraft", model="pixels", root=tmp_path)
    assert data.classes == ("A", "B")
    for samples, first in ((data.train, 0), (data.val, 10), (data.test, 20)):
        assert [number_of(x) for x in inputs(samples)] == [first, first + 1, first + 2, first + 3]
        assert labels(samples) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("MNISTT", ValueError, "no data set 'MNISTT': do you mean MNIST"),
        ("FakeData", ValueError, "FakeData is no data set by itself"),
        ("ImageFolder", ValueError, "ImageFolder is no data set by itself"),
        ("MNIST", FileNotFoundError, "is not in .*, or not whole: .*download=true"),
        ("DTD", FileNotFoundError, "is not in .*, or not whole: .*download=true"),
        ("EMNIST", ValueError, "torchvision:EMNIST has no split train or trainval"),
        ("MNIST?download=maybe", ValueError, "download must be true or false, got 'maybe'"),
        ("MNIST?downlod=true", ValueError, "downlod is no option .*: do you mean download?"),
    ],
)
def test_not_of_torchvision(name, error, said, tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(error, match=said):
        open_data(f"torchvision:{name}", root=tmp_path)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Hugging Face's ``datasets``, whose cache is the test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def test_a_table_of_texts(library, tmp_path):
    texts = [f"text number {i}" for i in range(30)]
    rows = "".join(f"{text},{10 + i % 3},u{i}\n" for i, text in enumerate(texts))
    folder = tmp_path / "reviews"
    folder.mkdir()
    (folder / "train.csv").write_text("body,stars,user\n" + rows)
    (folder / "test.csv").write_text("body,stars,user\nanother,11,u9\n")
    name = f"datasets:{folder}?text=body&label=stars"
    data = open_data(name, model="bert", tokens=16)
    assert (data.classes, data.kind) == (("10", "11", "12"), "text")
    assert [len(part) for part in (data.train, data.val, data.test)] == [27, 3, 1]
    assert torch.equal(data.test.sample(0, 1)[0][:3], encode(ENCODER.tokenizer, ["another"])[0])
    assert data.test.sample(0, None)[1] == 1
    ids = {tuple(x.tolist()) for x in inputs(data.train, 30)}
    assert len(ids) == 27 and {len(x) for x in ids} == {16}
    pair = open_data(name.replace("body", "body,user"), model="bert", tokens=16)
    assert (inputs(pair.train) == ENCODER.tokenizer.sep_token_id).sum(1).tolist() == [2] * 10
    one = open_data(f"datasets:{folder / 'train.csv'}", text="body", label="stars", model="bert")
    assert [len(one.train), len(one.val), one.test] == [27, 3, None]


def test_which_columns(library, tmp_path):
    path = tmp_path / "t.jsonl"

    def refused(said, options="", **columns):
        names = list(columns)
        rows = zip(*columns.values(), strict=True)
        path.write_text(
            "".join(str(dict(zip(names, r, strict=True))).replace("'", '"') + "\n" for r in rows)
        )
        with pytest.raises(ValueError, match=said):
            open_data(f"datasets:{path}{options}", model="bert")

    words, classes = ["a", "b", "c", "d"], [0, 1, 0, 1]
    refused("columns text, stars none is the label: say label=COLUMN", text=words, stars=classes)
    refused("none is the text: say text=COLUMN", label=classes, other=classes)
    refused("could be the text: title, body: say text=", label=classes, title=words, body=words)
    refused("no column 'x', but text, label", "?label=x", text=words, label=classes)
    refused("label has 0.5, which is no class", text=words, label=[0.5, 1.5, 0.5, 1.5])
    refused("at least two classes, has 1", text=words, label=[1, 1, 1, 1])
    refused("the network takes texts", "?image=text", text=words, label=classes)
    refused("label is a column of .*, not text", "?text=label&label=y", label=classes, y=classes)


def test_pictures_in_parquet(library, tmp_path, pixels):
    folder = tmp_path / "birds"
    folder.mkdir()
    features = library.Features(
        {"photo": library.Image(), "kind": library.ClassLabel(names=["jay", "owl"])}
    )
    for first, split in ((0, "train"), (50, "validation"), (70, "test")):
        of_test = split == "test"
        columns = {
            "photo": [image(first + i) for i in range(8)],
            "kind": [-1 if of_test else i % 2 for i in range(8)],
        }
        table = library.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / f"{split}.parquet")
    data = open_data(f"datasets:{folder}", model="pixels")
    assert (data.classes, data.kind, data.test) == (("jay", "owl"), "image", None)
    assert [number_of(x) for x in inputs(data.train)] == list(range(8))
    assert [number_of(x) for x in inputs(data.val)] == list(range(50, 58))
    assert labels(data.val) == [0, 1] * 4
    assert not torch.equal(
        data.train.transform(picture_of_two(), 1), data.train.transform(picture_of_two(), 2)
    )


def picture_of_two():
    found = image(0).resize((20, 20))
    found.paste((255, 255, 255), (0, 0, 10, 20))
    return found


def test_labels_that_train_does_not_have(library, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "d" / "test.csv").write_text("text,label\nc,x\nd,z\n")
    with pytest.raises(ValueError, match="1 rows of test have a label that .* in row 1: 'z'"):
        open_data(f"datasets:{tmp_path / 'd'}", model="bert")


def test_saved_to_disk(library, tmp_path):
    rows = {"text": list("abcdef"), "label": list("xyxyxy"), "mark": [1] * 6}
    library.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    data = open_data(f"datasets:{tmp_path / 'saved'}", model="bert")
    assert data.classes == ("x", "y") and len(data.train) + len(data.val) == 6


def test_no_such_table(library, tmp_path):
    with pytest.raises(OSError, match="datasets:no/such cannot be had"):
        open_data("datasets:no/such", model="bert")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="a.txt is none of .csv, .json"):
        open_data(f"datasets:{tmp_path / 'a.txt'}", model="bert")


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("digits", {"model": "bert"}, ValueError, "digits has images, but the network takes texts"),
        ("kind", {"model": "vit"}, ValueError, "kind has texts, but the network takes images"),
        ("kind", {"size": 32}, ValueError, "size is of images, but kind has texts"),
        ("digits", {"tokens": 32}, ValueError, "tokens are of texts, but digits has images"),
        ("kind", {"tokens": 4096}, ValueError, "takes at most 128 tokens, not 4096"),
        ("digits", {"size": 0}, ValueError, "size must be at least 1, got 0"),
        ("digits", {"size": "32"}, TypeError, "size must be an int or None, got '32'"),
        ("digits", {"flip": 0.5}, ValueError, r"flip is no option of digits \(it has none\)"),
        ("digits?", {}, ValueError, "behind the '\\?' there must be key=value"),
        ("kind", {"val_fraction": 1}, ValueError, r"val_fraction must be in \(0, 1\), got 1"),
        ("x?flip=0", {"flip": 0.5}, ValueError, "flip is given twice"),
        ("x?flip=no", {}, ValueError, "flip must be a number, got 'no'"),
        (3, {}, TypeError, "the name of the data must be a string, got 3"),
    ],
)
def test_options_that_do_not_fit(name, options, error, said):
    with pytest.raises(error, match=said):
        open_data(name, **options)
