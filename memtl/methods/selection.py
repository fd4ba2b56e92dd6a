"""Feature selection by group lasso: which of the many features a head reads are worth keeping.

Evci, Dumoulin, Larochelle and Mozer: Head2Toe: Utilizing Intermediate Representations for Better
Transfer Learning, ICML 2022.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from ..tasks import Split
from ..training import History, Settings, fit
from .base.backbone import classifier, linear_of
from .base.config import Config
from .base.features import OnFeatures, collect
from .base.head import ChunkedHead
from .base.record import applied, record, unwrapped


@dataclasses.dataclass(frozen=True)
class Selection:
    """What :func:`select_features` did. ``print`` it.

    Attributes:
        scores: [features], the norm of each feature's column in the head that was trained under
            the penalty.
        kept: [kept], indices of the largest scores, sorted.
        sizes: features of each chunk: the model's own, then each block's.
        scoring, training: the runs of the penalised head and of the compact one.
    """

    scores: Tensor
    kept: Tensor
    sizes: tuple[int, ...]
    scoring: History
    training: History

    def __str__(self) -> str:
        lines = [f"kept {len(self.kept):,} of {len(self.scores):,} features"]
        start = 0
        for m, size in enumerate(self.sizes):
            inside = ((self.kept >= start) & (self.kept < start + size)).sum().item()
            name = f"block {m - 1}" if m else "model's own"
            lines.append(f"  {name:12} {inside:6,} of {size:,}  {100 * inside / size:5.1f} %")
            start += size
        return "\n".join(lines)


def select_features(
    model: nn.Module,
    train: Split,
    fraction: float,
    settings: Settings,
    *,
    penalty: float = 1e-4,
    progress: bool | None = None,
) -> Selection:
    """Give a trained model a smaller head, on the features that matter.

    Features are computed once, in evaluation mode; queries stay as they are. A new head is trained
    on them with cross-entropy plus ``penalty`` times the sum over features j of |W[:, j]|; the
    floor(``fraction`` * features) with the largest |W[:, j]| are kept; another new head is trained
    on those alone and put in the model's place for it. ``memtl.save`` then saves the small head.

    Args:
        model: to which VQT or Head2Toe was applied, trained.
        train: what it was trained on.
        fraction: of the features, in (0, 1].
        settings: of both trainings; the paper takes half the learning rate of the first training.
        penalty: weight of the group lasso.

    Raises:
        TypeError: the model's head does not read chunks of features.
        ValueError: ``fraction`` is outside (0, 1] or keeps nothing, ``penalty`` is negative, or
            features were selected already.

    Memory: the features, [images, features], are held.
    """
    own = unwrapped(model)
    _, parent = classifier(own)
    head = linear_of(parent)
    if not isinstance(head, ChunkedHead):
        raise TypeError(
            f"expected a model whose head reads the features of its layers (VQT, Head2Toe), got a "
            f"{type(head).__name__}"
        )
    if head.selected is not None:
        raise ValueError("features of this model were selected already")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    if penalty < 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    features = sum(head.sizes)
    count = math.floor(fraction * features)
    if count < 1:
        raise ValueError(f"fraction {fraction} of {features} features keeps none")
    found = collect(model, train.images)

    scored = _like(head, None, settings.seed)
    scoring = fit(
        OnFeatures(scored),
        Split(found, train.labels),
        None,
        settings,
        penalty=lambda: penalty * torch.linalg.vector_norm(scored.weight, dim=0).sum(),
        progress=progress,
        description="scoring features",
    )
    scores = torch.linalg.vector_norm(scored.weight.detach(), dim=0)
    kept = scores.topk(count).indices.sort().values

    compact = _like(head, count, settings.seed)
    assert compact.selected is not None
    compact.selected.copy_(kept)
    training = fit(
        OnFeatures(compact),
        Split(found[:, kept], train.labels),
        None,
        settings,
        progress=progress,
        description="training the compact head",
    )
    parent.linear = compact.train(head.training)
    record(own, tuple(_selected(config, count) for config in applied(own)))
    return Selection(scores.cpu(), kept.cpu(), head.sizes, scoring, training)


def _like(head: ChunkedHead, selected: int | None, seed: int) -> ChunkedHead:
    """A fresh head on the same chunks, which ``seed`` alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classes, dtype = len(head.bias), head.weight.dtype
        fresh = ChunkedHead(head.sizes, classes, head.normalize, selected, dtype=dtype)
    return fresh.to(head.weight.device)


def _selected(config: Config, count: int) -> Config:
    if any(field.name == "selected" for field in dataclasses.fields(config)):
        return dataclasses.replace(config, selected=count)  # type: ignore[call-arg]
    return config
