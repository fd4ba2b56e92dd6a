"""How good a classifier is beyond its accuracy: how well it knows how sure it may be, and whether
it is less sure of what it was never taught."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tasks import Images, Split
from .loop import evaluating
from .metrics import accuracy, count

BINS = 15
"""Of the calibration error, as in Guo et al. (2017)."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """What :func:`quality` measures.

    Attributes:
        accuracy: The fraction of samples that are classified correctly.
        ece: :func:`calibration_error`, 0 to 1; smaller is better.
        nll: :func:`negative_log_likelihood`, in nats; smaller is better.
        ood_auc: :func:`ood_auc` by the name of what was outside, 0 to 1; 0.5 is chance.
    """

    accuracy: float
    ece: float
    nll: float
    ood_auc: Mapping[str, float] = dataclasses.field(default_factory=dict)


def quality(
    model: nn.Module,
    split: Split,
    out: Mapping[str, Split] | None = None,
    *,
    batch_size: int = 256,
) -> Quality:
    """The quality of ``model``, in evaluation mode, on ``split``.

    Args:
        model: returns logits ``[n, C]``.
        split: samples with a label each.
        out: by name, samples of none of its classes (:mod:`memtl.tasks.outside`); their labels are
            not looked at.
        batch_size: images at a time.

    Raises:
        TypeError, ValueError, FloatingPointError: as the functions below.

    Memory: the logits of one split after another.
    """
    logits = logits_of(model, split.images, batch_size=batch_size)
    outside = {
        name: ood_auc(logits, logits_of(model, other.images, batch_size=batch_size))
        for name, other in (out or {}).items()
    }
    return Quality(
        accuracy(count(*_checked(logits, split.labels))),
        calibration_error(logits, split.labels),
        negative_log_likelihood(logits, split.labels),
        outside,
    )


@torch.no_grad()
def logits_of(model: nn.Module, images: Images, *, batch_size: int = 256) -> Tensor:
    """What ``model``, in evaluation mode, gives for each image: ``[n, ...]``, on the CPU.

    Raises:
        ValueError: there is no image, or ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(images):
        raise ValueError("there must be at least one image, got none")
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model(batch.to(device)).cpu() for batch in images.split(batch_size)])


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """The expected calibration error (Guo, Pleiss, Sun, Weinberger: "On calibration of modern
    neural networks", ICML 2017): how far confidence and accuracy are apart, on average.

    Samples go by confidence, the largest softmax probability, into bins of equal width: bin m of M
    is ((m - 1) / M, m / M]. The error is the mean over bins, weighted by their samples, of the
    difference between the mean confidence and the accuracy in a bin. It is biased upward where bins
    have few samples: compare models on the same ones.

    Args:
        logits: ``[n, C]``, in floating point.
        labels: ``[n]`` int64, each in ``0 .. C - 1``.
        bins: their number.

    Raises:
        TypeError: the logits are not in floating point, or the labels no whole numbers.
        ValueError: ``bins`` is less than 1, there is no sample, or less than two classes, the
            shapes do not fit, or a label is outside its range.
        FloatingPointError: a logit is not finite.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    logits, labels = _checked(logits, labels)
    confidence = logits.softmax(1).amax(1)
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    short = (logits.argmax(1) == labels).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64)
    sums.index_add_(0, torch.bucketize(confidence, edges), short)
    return (sums.abs().sum() / len(labels)).item()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """The mean of -log of the probability given to the label, in nats.

    Arguments and errors are those of :func:`calibration_error`.
    """
    return F.cross_entropy(*_checked(logits, labels)).item()


def ood_auc(inside: Tensor, outside: Tensor) -> float:
    """How well confidence tells what is in distribution from what is not (Hendrycks, Gimpel: "A
    baseline for detecting misclassified and out-of-distribution examples", ICLR 2017): the area
    under the ROC curve, which is the probability that of a sample of each kind the one inside has
    the larger maximum softmax probability, a tie being half.

    Probabilities that would be rounded to 1 are still told apart: what is compared is the sum of
    all others, relative to the largest, whose logarithm falls as the largest rises.

    Args:
        inside, outside: logits ``[n, C]`` and ``[m, C]``, in floating point.

    Raises:
        TypeError: they are not in floating point.
        ValueError: one is empty, has another shape, or less than two classes, or their classes
            differ.
        FloatingPointError: a logit is not finite.
    """
    inside, outside = (
        _checked_logits(logits, name) for logits, name in ((inside, "inside"), (outside, "outside"))
    )
    if inside.shape[1] != outside.shape[1]:
        raise ValueError(
            f"inside and outside must be of as many classes, got {[*inside.shape]} and "
            f"{[*outside.shape]}"
        )
    sure, other = _doubt(inside), _doubt(outside).sort().values
    # Of the others those with more doubt, and those with as much or more, for each one inside.
    more, at_least = (len(other) - torch.searchsorted(other, sure, right=r) for r in (True, False))
    return ((more + at_least).double().mean() / (2 * len(other))).item()


def _doubt(logits: Tensor) -> Tensor:
    """log(1 / p - 1) of the largest softmax probability p."""
    ordered = logits.sort(1, descending=True).values
    return (ordered[:, 1:] - ordered[:, :1]).logsumexp(1)


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, the logits in float64."""
    logits = _checked_logits(logits, "logits")
    labels = labels.cpu()
    count(logits, labels)  # which checks that they fit
    return logits, labels.long()


def _checked_logits(logits: Tensor, name: str) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{name} must be a tensor in floating point, got {got}")
    if logits.ndim != 2 or not len(logits) or logits.shape[1] < 2:
        raise ValueError(
            f"{name} must be [n, C], of at least one sample and two classes, got {[*logits.shape]}"
        )
    if not logits.isfinite().all():
        raise FloatingPointError(f"{name} must be finite, but hold NaN or infinities")
    return logits.detach().cpu().double()
