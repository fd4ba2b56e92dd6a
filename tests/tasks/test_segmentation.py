import dataclasses

import pytest
import torch

from memtl.tasks import Split, load_digits, load_digits_segmentation, segmentation
from memtl.tasks.digits import MEAN, STD

SIZES = (12, 6, 8)


def same(first: Split, second: Split) -> bool:
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


@pytest.fixture(scope="module")
def task():
    return load_digits_segmentation()


def small():
    return load_digits_segmentation(sizes=SIZES)


def test_sizes_shapes_and_types(task):
    assert (task.name, task.num_classes) == ("digit segmentation", 11)
    assert task.metric == "mean_iou" and load_digits(8).metric == "accuracy"
    for split, n in zip((task.train, task.val, task.test), (800, 200, 400), strict=True):
        assert split.images.shape == (n, 1, 64, 64) and split.labels.shape == (n, 64, 64)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
        # Every class occurs, the background mostly.
        counts = split.labels.flatten().bincount(minlength=11)
        assert len(counts) == 11 and (counts > 0).all() and counts[0] > counts[1:].sum()


def test_ink_and_labels_agree(task):
    ink = task.val.images[:, 0] * STD + MEAN
    assert ink.min() >= -1e-6 and ink.max() <= 1 + 1e-6
    labelled = task.val.labels > 0
    assert ink[labelled].min() > segmentation.THRESHOLD - 1e-6
    assert ink[~labelled].max() <= segmentation.THRESHOLD + 1e-6


def test_pixels_take_the_class_of_their_digit():
    """Digits that are told apart by their ink: each pixel shows whose it is."""
    ink = torch.tensor([0.6, 0.8, 1.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    digits = Split((ink - MEAN) / STD, torch.tensor([7, 0, 9]))
    canvases = segmentation.compose(digits, 20, 64, torch.Generator().manual_seed(1))
    shown = canvases.images[:, 0] * STD + MEAN
    for value, label in ((0.0, 0), (0.6, 8), (0.8, 1), (1.0, 10)):
        drawn = (shown - value).abs() < 1e-4
        assert drawn.any() and torch.equal(drawn, canvases.labels == label)


def test_faint_ink_hides_nothing():
    """A digit below the threshold changes neither labels nor what lies below it."""
    pixels = torch.tensor([1.0, 0.2]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    digits = Split((pixels - MEAN) / STD, torch.tensor([3, 5]))
    canvases = segmentation.compose(digits, 20, 32, torch.Generator().manual_seed(1))
    assert set(canvases.labels.unique().tolist()) == {0, 4}
    ink = canvases.images[:, 0] * STD + MEAN
    drawn = ink[canvases.labels == 4]
    torch.testing.assert_close(drawn, torch.ones_like(drawn))


@pytest.mark.parametrize("altered", ["train", "val", "test"])
def test_a_split_is_made_of_its_own_digits_alone(monkeypatch, altered):
    """With other digits in one split of the source, that split changes and no other."""

    def load(size):
        digits = load_digits(size)
        split = getattr(digits, altered)
        other = Split(split.images.flip(-1), (split.labels + 1) % 10)
        return dataclasses.replace(digits, **{altered: other})

    before = small()
    monkeypatch.setattr(segmentation, "load_digits", load)
    after = small()
    for name in ("train", "val", "test"):
        assert same(getattr(before, name), getattr(after, name)) == (name != altered)


def test_deterministic_and_independent_of_the_global_seed(task):
    torch.manual_seed(99)
    expected = torch.rand(2)
    torch.manual_seed(99)
    again = small()
    assert torch.equal(torch.rand(2), expected)
    # The first canvases are those of the whole task, whatever the sizes.
    for name, n in zip(("train", "val", "test"), SIZES, strict=True):
        whole = getattr(task, name)
        assert same(getattr(again, name), Split(whole.images[:n], whole.labels[:n]))


def test_splits_share_no_canvas(task):
    images = torch.cat([task.train.images, task.val.images, task.test.images])
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_canvas_size():
    split = load_digits_segmentation(48, sizes=(2, 1, 1)).train
    assert split.images.shape == (2, 1, 48, 48) and split.labels.shape == (2, 48, 48)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "^size must be an int, got float", {"size": 64.0}),
        (ValueError, "^size must be at least 32, got 31", {"size": 31}),
        (TypeError, "sizes must be three ints .*, got 800", {"sizes": 800}),
        (TypeError, "sizes must be three ints .*, got \\(1, 2\\)", {"sizes": (1, 2)}),
        (TypeError, "the val size must be an int, got bool", {"sizes": (1, True, 1)}),
        (ValueError, "the test size must be at least 1, got 0", {"sizes": (1, 1, 0)}),
    ],
)
def test_wrong_arguments(error, message, options):
    with pytest.raises(error, match=message):
        load_digits_segmentation(**options)
