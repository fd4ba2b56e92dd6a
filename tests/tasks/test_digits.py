import sys

import pytest
import torch
from sklearn import datasets

from memtl.tasks import Split, Task, load_digits
from memtl.tasks.digits import MEAN, STD


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_digits()


def splits(task: Task) -> list[Split]:
    return [task.train, task.val, task.test]


def test_sizes_shapes_and_types(digits):
    assert (digits.name, digits.num_classes) == ("digits", 10)
    assert [len(split) for split in splits(digits)] == [1000, 300, 497]
    for split in splits(digits):
        assert split.images.shape == (len(split), 1, 32, 32)
        assert split.labels.shape == (len(split),)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)


def test_splits_are_stratified(digits):
    everywhere = torch.from_numpy(datasets.load_digits().target).bincount() / 1797
    for split in splits(digits):
        expected = everywhere * len(split)
        assert (split.labels.bincount(minlength=10) - expected).abs().max() <= 1


def test_splits_are_a_partition_of_the_source():
    # At its own size nothing is resized, so every image can be recognised by its 64 values.
    native = load_digits(size=8)
    seen = [
        (*(image * STD + MEAN).mul(16).round().int().flatten().tolist(), label)
        for split in splits(native)
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    ]
    source = datasets.load_digits()
    wanted = [
        (*map(int, image.flatten()), int(label))
        for image, label in zip(source.images, source.target, strict=True)
    ]
    assert len(set(wanted)) == 1797  # no two images alike: equality below means disjointness
    assert sorted(seen) == sorted(wanted)


def test_ink_is_bright_and_normalised(digits):
    images = torch.cat([split.images for split in splits(digits)])
    ink = images * STD + MEAN
    assert ink.min() >= -1e-6 and ink.max() <= 1 + 1e-6
    assert images.mean().abs() < 0.02
    # The paper around the digit stays dark, the middle carries the ink.
    assert ink[..., 0].mean() < 0.05
    assert ink[..., 16].mean() > 0.3


def test_native_resolution_is_standardised():
    images = torch.cat([split.images for split in splits(load_digits(size=8))])
    assert images.mean().abs() < 1e-3
    assert abs(images.std() - 1) < 1e-3


def test_deterministic_and_independent_of_the_global_seed(digits):
    torch.manual_seed(99)
    again = load_digits()
    for first, second in zip(splits(digits), splits(again), strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)


def test_split_is_frozen(digits):
    with pytest.raises(AttributeError):
        digits.train.labels = digits.val.labels


@pytest.mark.parametrize("size", [32.0, "32", True, None])
def test_size_of_a_wrong_type(size):
    with pytest.raises(TypeError, match="size must be an int, got"):
        load_digits(size)


def test_size_too_small():
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        load_digits(0)


def test_missing_sklearn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install memtl\[demo\]"):
        load_digits()
