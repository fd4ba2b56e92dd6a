import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    jaccard_score,
    matthews_corrcoef,
)
from torch import nn

from memtl.tasks import Split
from memtl.training import METRICS, Settings, evaluate, fit, metrics


class Logits(nn.Module):
    """Its images are its logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x


def test_by_hand():
    # Of three samples of class 0 two are right; the one of class 1 is; class 2 never occurs.
    counts = torch.tensor([[2, 1, 0], [3, 1, 0], [2, 2, 0]])
    assert metrics.accuracy(counts) == 3 / 4
    assert metrics.mean_iou(counts) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_class_that_is_only_predicted_counts():
    assert metrics.mean_iou(torch.tensor([[1, 0], [2, 0], [1, 1]])) == 0.25


def test_counts():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = metrics.count(logits, torch.tensor([0, 1, 1]))
    right, labelled, predicted = found.tolist()
    assert (right, labelled, predicted) == ([0, 1], [1, 2], [1, 2])
    assert found.dtype == torch.int64


@pytest.mark.parametrize("shape", [(50,), (6, 7, 5)], ids=["samples", "pixels"])
@pytest.mark.parametrize("classes", [2, 7])
def test_as_scikit_learn(shape, classes):
    logits = torch.randn(shape[0], classes, *shape[1:])
    labels = torch.randint(classes, shape)
    truth, found = labels.flatten(), logits.argmax(1).flatten()
    matrix = torch.from_numpy(confusion_matrix(truth, found, labels=range(classes)))
    expected_counts = [matrix.diagonal(), matrix.sum(1), matrix.sum(0)]
    assert metrics.count(logits, labels).tolist() == [c.tolist() for c in expected_counts]
    expected = {
        "accuracy": accuracy_score(truth, found),
        "matthews": matthews_corrcoef(truth, found),
        "mean_iou": jaccard_score(truth, found, average="macro"),
    }
    for name in METRICS:
        for batch_size in (4, 256):
            score = evaluate(Logits(), Split(logits, labels), batch_size=batch_size, metric=name)
            assert score == pytest.approx(expected[name], abs=1e-12), name


def test_fit_takes_the_metric():
    split = Split(torch.randn(8, 3, 4, 4), torch.randint(3, (8, 4, 4)))
    model = Logits()
    history = fit(model, split, split, Settings(2, batch_size=4), metric="mean_iou")
    assert history.val_score == evaluate(model, split, metric="mean_iou")
    assert history.val_score != evaluate(model, split)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((4, 3, 8, 8), (4, 4, 4), r"logits \[4, 3, 8, 8\] need labels \[4, 8, 8\].* \[4, 4, 4\]"),
        ((4, 3, 8, 8), (4,), r"need labels \[4, 8, 8\], got labels \[4\]"),
        ((4, 3), (4, 8, 8), r"logits \[4, 3\] need labels \[4\], got labels \[4, 8, 8\]"),
        ((4,), (4,), r"logits \[4\] need to be \[n, classes, ...\]"),
    ],
)
def test_shapes_that_do_not_fit(logits, labels, message):
    labels = torch.zeros(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        evaluate(Logits(), Split(torch.randn(logits), labels))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label):
    with pytest.raises(ValueError, match=rf"in 0 .. 2, .* in {min(label, 0)} .. {max(label, 0)}"):
        metrics.count(torch.randn(2, 3), torch.tensor([0, label]))


def test_labels_of_a_wrong_type():
    with pytest.raises(TypeError, match="labels must be int64, got torch.float32"):
        metrics.count(torch.randn(2, 3), torch.zeros(2))


def test_an_unknown_metric_fails_before_training():
    split, model = Split(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)), Logits()
    for call in (
        lambda: evaluate(model, split, metric="iou"),
        lambda: fit(model, split, split, Settings(2), metric="iou"),
    ):
        with pytest.raises(
            ValueError, match="metric must be one of accuracy, matthews, mean_iou, got 'iou'"
        ):
            call()
    assert model.scale == 1


def test_logits_that_are_no_numbers():
    with pytest.raises(FloatingPointError, match="the logits hold NaN"):
        metrics.count(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))


def test_matthews_of_one_class_is_nothing():
    assert metrics.matthews(torch.tensor([[0, 3], [5, 3], [0, 8]])) == 0.0
