"""Calibration, likelihood, detection: against definitions written out, and known cases."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from memtl.tasks import Split
from memtl.training import Quality, evaluate, quality
from memtl.training.quality import (
    BINS,
    calibration_error,
    logits_of,
    negative_log_likelihood,
    ood_auc,
)


class Logits(nn.Module):
    """Its images are its logits, in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x * (math.nan if self.training else 1)


def sure(confidence: list[float], predicted: list[int], dtype=torch.float64) -> torch.Tensor:
    """Logits of two classes, one of which is predicted with that probability."""
    p = torch.tensor(confidence, dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], 1)
    swap = torch.tensor(predicted, dtype=torch.bool)
    return torch.where(swap[:, None], logits.flip(1), logits).to(dtype)


def calibration_by_hand(logits, labels, bins):
    exact = logits.double().numpy()
    p = np.exp(exact - exact.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    total = 0.0
    for m in range(1, bins + 1):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(p, labels.tolist(), strict=True)
            if (m - 1) / bins < row.max() <= m / bins
        ]
        if inside:
            confidence, right = np.mean(inside, axis=0)
            total += len(inside) / len(labels) * abs(right - confidence)
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "classes", "bins"), [(1, 2, 15), (317, 7, 15), (53, 3, 1)])
def test_as_defined(dtype, n, classes, bins):
    logits = (2 * torch.randn(classes, n)).to(dtype).T  # not contiguous
    labels = torch.randint(classes, (n,))
    wanted = calibration_by_hand(logits, labels, bins)
    assert calibration_error(logits, labels, bins=bins) == pytest.approx(wanted, abs=1e-12)
    p = logits.double().softmax(1)
    wanted = log_loss(labels, p, labels=range(classes))
    assert negative_log_likelihood(logits, labels) == pytest.approx(wanted, abs=1e-12)


def test_a_calibrated_model_has_no_error():
    confidence = [0.75] * 8 + [0.6] * 10
    right = [1] * 6 + [0] * 2 + [1] * 6 + [0] * 4
    predicted = torch.randint(2, (18,)).tolist()
    labels = torch.tensor([p if r else 1 - p for p, r in zip(predicted, right, strict=True)])
    logits = sure(confidence, predicted)
    assert calibration_error(logits, labels) == pytest.approx(0, abs=1e-15)
    # In one bin errors of either sign cancel; of the same logits, now all wrong, they do not.
    assert calibration_error(logits, labels, bins=1) == pytest.approx(0, abs=1e-15)
    wrong = calibration_error(logits, 1 - torch.tensor(predicted))
    assert wrong == pytest.approx(np.mean(confidence))


def test_confidences_at_an_edge_belong_below_it():
    # 4/5 exactly: in 5 bins with 0.7, not with 0.9, and then the two errors cancel.
    logits = torch.tensor([[4.0, 1.0], [3.0, 1.0], [0.9, 0.1]], dtype=torch.float64)
    logits = (logits / logits.sum(1, keepdim=True)).log()
    confidence = logits.softmax(1).amax(1)
    assert confidence[0] == 0.8
    labels = torch.tensor([0, 1, 0])
    c = confidence.tolist()
    wanted = (abs(1 - c[0] + 0 - c[1]) + abs(1 - c[2])) / 3
    assert calibration_error(logits, labels, bins=5) == pytest.approx(wanted, abs=1e-12)


def test_the_likelihood_of_what_is_impossible_is_finite():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert negative_log_likelihood(logits, torch.tensor([0, 0])) == 5e3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "classes"), [(1, 1, 2), (40, 31, 2), (13, 70, 10)])
def test_detection_as_defined(dtype, n, m, classes):
    inside = (3 * torch.randn(n, classes)).to(dtype)
    outside = torch.randn(m, classes).to(dtype)
    outside[: m // 3] = inside[:1]  # ties
    ours = ood_auc(inside, outside)
    # Rounded, so that a tie is one whatever the order of a sum.
    a, b = (x.double().softmax(1).amax(1).numpy().round(12) for x in (inside, outside))
    pairs = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    assert ours == pytest.approx(pairs.mean(), abs=1e-12)
    known = np.repeat([1, 0], [n, m])
    assert ours == pytest.approx(roc_auc_score(known, np.concatenate([a, b])), abs=1e-12)


def test_known_detections():
    confident, unsure = sure([0.9, 0.95], [0, 1]), sure([0.6, 0.7, 0.8], [1, 1, 0])
    assert ood_auc(confident, unsure) == 1
    assert ood_auc(unsure, confident) == 0
    assert ood_auc(unsure, unsure) == 0.5
    same = torch.randn(1, 5)
    assert ood_auc(same.expand(4, 5), same.flip(1).expand(3, 5)) == 0.5


def test_probabilities_that_round_to_one_are_told_apart():
    inside, outside = torch.tensor([[90.0, 0.0, 0.0]]), torch.tensor([[60.0, 0.0, 0.0]])
    assert inside.softmax(1).amax() == outside.softmax(1).amax() == 1
    assert ood_auc(inside, outside) == 1
    assert ood_auc(outside, inside) == 0


def test_of_a_model():
    split = Split(torch.randn(50, 4), torch.randint(4, (50,)))
    out = {"far": Split(0.1 * torch.randn(20, 4), torch.full((20,), -1)), "same": split}
    model = Logits().train()
    found = quality(model, split, out, batch_size=7)
    assert model.training
    assert found == Quality(
        evaluate(model, split),
        calibration_error(split.images, split.labels),
        negative_log_likelihood(split.images, split.labels),
        {"far": ood_auc(split.images, out["far"].images), "same": 0.5},
    )
    assert found.ood_auc["far"] > 0.9
    assert json.loads(json.dumps(dataclasses.asdict(found)))["nll"] == found.nll
    assert quality(model, split).ood_auc == {}
    assert torch.equal(logits_of(model, split.images, batch_size=9), split.images)


@pytest.mark.parametrize("function", [calibration_error, negative_log_likelihood])
@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.randn(0, 3), torch.zeros(0).long(), ValueError, r"at least one sample .* \[0, 3\]"),
        (torch.randn(4, 1), torch.zeros(4).long(), ValueError, r"two classes, got \[4, 1\]"),
        (torch.randn(4), torch.zeros(4).long(), ValueError, r"\[n, C\].* got \[4\]"),
        (torch.randn(4, 3, 2), torch.zeros(4, 2).long(), ValueError, r"got \[4, 3, 2\]"),
        (torch.randn(4, 3), torch.zeros(5).long(), ValueError, r"need labels \[4\], got .* \[5\]"),
        (torch.randn(4, 3), torch.full((4,), 3), ValueError, r"labels must be in 0 .. 2"),
        (torch.randn(4, 3), torch.zeros(4), TypeError, "labels must be int64"),
        (torch.ones(4, 3).long(), torch.zeros(4).long(), TypeError, "floating point, got .*int64"),
        ([[0.1, 0.9]], torch.zeros(1).long(), TypeError, "floating point, got list"),
        (torch.full((2, 3), math.nan), torch.zeros(2).long(), FloatingPointError, "finite"),
        (torch.full((2, 3), math.inf), torch.zeros(2).long(), FloatingPointError, "finite"),
    ],
)
def test_what_is_refused(function, logits, labels, error, message):
    with pytest.raises(error, match=message):
        function(logits, labels)


def test_what_detection_and_a_model_refuse():
    good = torch.randn(3, 4)
    for a, b, error, message in (
        (good, good[:0], ValueError, r"outside must be .* got \[0, 4\]"),
        (good[:, :1], good, ValueError, r"inside must be .* two classes"),
        (good, good[:, :3], ValueError, r"as many classes, got \[3, 4\] and \[3, 3\]"),
        (good, good * math.nan, FloatingPointError, "outside must be finite"),
        (good.long(), good, TypeError, "inside must be a tensor in floating point"),
    ):
        with pytest.raises(error, match=message):
            ood_auc(a, b)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        calibration_error(good, torch.tensor([0, 1, 2]), bins=0)
    split = Split(good, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="at least one image, got none"):
        quality(Logits(), split, {"nothing": Split(good[:0], split.labels[:0])})
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        quality(Logits(), split, batch_size=0)
    assert BINS == 15
