"""Scores of a classifier, all of them from the same three counts of every class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def accuracy(counts: Tensor) -> float:
    """The fraction of samples, or pixels, whose class is predicted."""
    right, labelled, _ = counts
    return (right.sum() / labelled.sum().double()).item()


def mean_iou(counts: Tensor) -> float:
    """The mean over classes of intersection over union.

    A class that occurs neither in the labels nor in the predictions has no union, and no part in
    the mean.
    """
    both, labelled, predicted = counts
    union = labelled + predicted - both
    return (both / union.double())[union > 0].mean().item()


def matthews(counts: Tensor) -> float:
    """Matthews' correlation coefficient, of any number of classes (Gorodkin, 2004); 0 where all
    labels, or all predictions, are of one class."""
    right, labelled, predicted = counts.double()
    total = labelled.sum()
    covariance = right.sum() * total - (labelled * predicted).sum()
    spread = (total**2 - (labelled**2).sum()) * (total**2 - (predicted**2).sum())
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


METRICS: dict[str, Callable[[Tensor], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "mean_iou": mean_iou,
}
"""What a task can be scored by: functions of what :func:`count` counts in at least one sample; a
number of at most 1."""


def metric_named(name: str) -> Callable[[Tensor], float]:
    """One of :data:`METRICS`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]


def count(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every class, how often it is predicted rightly, occurs, and is predicted.

    Args:
        logits: ``[n, C]``, or ``[n, C, H, W]`` where every pixel has a class.
        labels: ``[n]`` or ``[n, H, W]`` int64, each in ``0 .. C - 1``.

    Returns:
        ``[3, C]`` int64, on the device of ``logits``.

    Raises:
        TypeError: the labels are no whole numbers.
        ValueError: the shapes do not fit, or a label is outside its range.
        FloatingPointError: a logit is NaN.
    """
    labels, classes = check_labels(logits, labels), logits.shape[1]
    if logits.isnan().any():  # argmax would call them a class
        raise FloatingPointError("the logits hold NaN: they tell no class")
    predicted = logits.argmax(1)
    found = (labels[predicted == labels], labels, predicted)
    return torch.stack([classes_.flatten().bincount(minlength=classes) for classes_ in found])


def check_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """``labels`` as int64 on the device of ``logits``, which they fit.

    Raises:
        TypeError, ValueError: as :func:`count`; ``logits`` is no tensor.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"a model must return a tensor of logits, got {type(logits).__name__}")
    check_whole(labels)
    if logits.ndim < 2 or labels.shape != (wanted := (len(logits), *logits.shape[2:])):
        needs = f"labels {[*wanted]}" if logits.ndim >= 2 else "to be [n, classes, ...]"
        raise ValueError(f"logits {[*logits.shape]} need {needs}, got labels {[*labels.shape]}")
    classes = logits.shape[1]
    labels = labels.to(logits.device, torch.int64)
    if labels.numel() and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels must be in 0 .. {classes - 1}, for there are {classes} logits, but they are "
            f"in {labels.min()} .. {labels.max()}"
        )
    return labels


def check_whole(labels: Tensor) -> None:
    """Raise TypeError unless ``labels`` is a tensor of whole numbers."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an int64 tensor, got {type(labels).__name__}")
    if labels.is_floating_point():
        raise TypeError(f"labels must be int64, got {labels.dtype}")
