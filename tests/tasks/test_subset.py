"""Subsets: how many, of which classes, the same again; and what leaves a class empty."""

import itertools
import re

import pytest
import torch

from memtl.tasks import Split, load_digits, subset
from memtl.tasks.subset import Selected, select
from memtl.training import Settings, fit


def split_of(counts: list[int], names: list[int] | None = None) -> Split:
    """Samples in random order, each image being its position."""
    labels = torch.tensor(names or range(len(counts))).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    return Split(torch.arange(len(labels)), labels)


class Lazy:
    """Images that note what was asked for."""

    def __init__(self, images):
        self.images, self.asked = images, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        found = self.images[index]
        self.asked += len(found)
        return found

    def split(self, size):
        return (self[i : i + size] for i in range(0, len(self), size))


@pytest.mark.parametrize("fraction", [1, 0.5, 0.37, 0.2, 0.11])
def test_balanced_counts(fraction):
    split = split_of([40, 40, 3, 17], names=[0, 5, 6, 9])
    found = subset(split, fraction, seed=3)
    assert len(found) == len(found.images) == int(fraction * 100)
    assert torch.equal(split.labels[found.images], found.labels)
    assert torch.equal(found.images, found.images.unique())  # in order, none twice
    counts = found.labels.bincount(minlength=10)[[0, 5, 6, 9]]
    assert counts.min() >= 1
    whole = torch.tensor([40, 40, 3, 17])
    more = counts[counts < whole]  # of those with more to give
    assert not len(more) or counts.max() - more.min() <= 1


def test_the_seed_alone_decides():
    split = split_of([30, 30, 30])
    torch.manual_seed(1)
    first = subset(split, 0.3, seed=7).images
    torch.manual_seed(2)
    assert torch.equal(subset(split, 0.3, seed=7).images, first)
    assert not torch.equal(subset(split, 0.3, seed=8).images, first)


def test_a_smaller_one_lies_inside():
    split = split_of([30, 8, 50])
    sets = [{*subset(split, f, seed=4).images.tolist()} for f in (0.05, 0.3, 0.31, 0.9, 1.0)]
    assert all(small <= large for small, large in itertools.pairwise(sets))
    assert sets[-1] == {*range(88)}


def test_each_class_of_a_turn_and_each_sample_may_come_first():
    split = split_of([5, 5, 5])
    chosen = torch.stack([subset(split, 4 / 15, seed=s).images for s in range(80)])
    extra = split.labels[chosen].sum(1) - 3  # of 3 classes each has one, and one has two
    assert {*extra.tolist()} == {0, 1, 2}
    assert {*chosen.flatten().tolist()} == {*range(15)}


def test_the_first_of_a_split():
    split = split_of([50, 50])
    found = subset(split, 0.29, how="first", seed=5)  # 0.29 * 100 is 28.999999999999996
    assert found.images.tolist() == [*range(29)]
    assert torch.equal(found.labels, split.labels[:29])


def test_a_class_left_empty():
    split = Split(torch.arange(1000), torch.arange(1000) // 250)
    for fraction, how, empty, enough in (
        (0.003, "balanced", "class .", "0.004"),
        (0.0005, "balanced", "4 classes .0, 1, 2, 3.", "0.004"),
        (0.5, "first", "2 classes .2, 3.", "0.751"),
        (0.75, "first", "class 3", "0.751"),
    ):
        message = f"{fraction} of 1000 samples are .* leaves {empty} empty: a fraction of {enough} "
        with pytest.raises(ValueError, match=message):
            subset(split, fraction, how=how)
        assert len(subset(split, float(enough), how=how).labels.unique()) == 4
    with pytest.raises(ValueError, match=r"97 classes \(.*, \.\.\.\) empty"):
        subset(Split(torch.arange(100), torch.arange(100)), 0.03)


@pytest.mark.parametrize("how", ["balanced", "first"])
@pytest.mark.parametrize("counts", [[3, 4], [70, 1, 20], [1] * 7, [30, 29, 31, 1, 1]])
def test_the_fraction_named_is_the_least(how, counts):
    split = split_of(counts)
    n = len(split)
    with pytest.raises(ValueError, match="empty") as error:
        subset(split, 1e-6, how=how)
    enough = float(re.search(r"fraction of (\S+) is", str(error.value))[1])
    found = subset(split, enough, how=how)
    assert len(found.labels.unique()) == len(counts)
    with pytest.raises(ValueError, match="empty"):
        subset(split, enough - 1 / n if enough > 1 / n else 1e-9, how=how)


def test_images_that_are_read_when_asked_for():
    images = torch.randn(60, 1, 8, 8)
    labels = torch.arange(60) % 3
    lazy = Lazy(images)
    found = subset(Split(lazy, labels), 0.2, seed=1)
    held = subset(Split(images, labels), 0.2, seed=1)
    assert lazy.asked == 0 and isinstance(found.images, Selected) and len(found.images) == 12
    assert torch.equal(found.images[2:5], held.images[2:5]) and lazy.asked == 3
    index = torch.tensor([7, 0, 7])
    assert torch.equal(found.images[index], held.images[index])
    batches = zip(found.images.split(5), held.images.split(5), strict=True)
    assert all(torch.equal(mine, its) for mine, its in batches)
    again = select(found, torch.tensor([3, 1]))
    assert torch.equal(again.images[:], held.images[[3, 1]])
    losses = []
    for split in (found, held):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        losses.append(fit(model, split, None, Settings(4, 5), progress=False).losses)
    assert losses[0] == losses[1]


def test_of_the_digits():
    train = load_digits(8).train
    found = subset(train, 0.05)
    assert found.labels.bincount().tolist() == [5] * 10
    assert found.images.shape == (50, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fraction": 0}, ValueError, r"fraction must be in \(0, 1\], got 0"),
        ({"fraction": 1.01}, ValueError, r"in \(0, 1\], got 1.01"),
        ({"fraction": float("nan")}, ValueError, r"in \(0, 1\], got nan"),
        ({"fraction": "0.1"}, TypeError, "fraction must be a number, got str"),
        ({"fraction": True}, TypeError, "fraction must be a number, got bool"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"how": "last"}, ValueError, "how must be one of balanced, first, got 'last'"),
        ({"split": torch.zeros(3)}, TypeError, "split must be a Split, got Tensor"),
        ({"split": Split(torch.zeros(3), torch.zeros(3))}, TypeError, "labels must be int64"),
        (
            {"split": Split(torch.zeros(2, 4), torch.zeros(2, 4).long())},
            ValueError,
            r"labels must be \[n\], .* got \[2, 4\]",
        ),
        (
            {"split": Split(torch.zeros(0), torch.zeros(0).long())},
            ValueError,
            r"at least one sample, got \[0\]",
        ),
    ],
)
def test_what_is_refused(change, error, message):
    arguments = {"split": split_of([2, 2]), "fraction": 0.5, **change}
    with pytest.raises(error, match=message):
        subset(**arguments)
