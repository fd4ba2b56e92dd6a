"""Head2Toe: a linear classifier on what every block of a frozen vision transformer gives.

Evci, Dumoulin, Larochelle and Mozer: Head2Toe: Utilizing Intermediate Representations for Better
Transfer Learning, ICML 2022; in the form in which Visual Query Tuning is compared with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base.backbone import Backbone
from .base.freezing import freeze
from .base.head import ChunkedHead
from .base.reading import ReadBlock, Reader, attach, tokens
from .base.transfer import Trained, TransferConfig, check_count, check_flag, replace_classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head2ToeConfig(TransferConfig):
    """A head on the model's own feature and on every block's tokens Z_m, averaged.

    The tokens of a block, the class token among them, are averaged over ``pool`` runs of equal
    length (neighbours share a token where N / pool is no whole number), which gives pool x D
    features a block. A head on T means a block has the size of VQT's on T queries. Nothing is kept
    for backward but those features, and the model stays in evaluation mode whatever ``train()``
    says. Which features are worth keeping, the other half of the method, is
    :func:`memtl.select_features`.

    Args:
        pool: means of each block, at most as many as it has tokens.
        normalize: whether each part that the head reads is normalised.
        selected: number of features that the head reads, by group lasso; set by
            :func:`memtl.select_features`.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: ``pool`` < 1, or another value outside its range.
    """

    method: ClassVar[str] = "head2toe"
    networks: ClassVar[str] = "vision transformers"
    pool: int = 1
    normalize: bool = True
    selected: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("pool", self.pool)
        check_flag("normalize", self.normalize)
        if self.selected is not None:
            check_count("selected", self.selected)

    def apply(self, model: nn.Module) -> Trained:
        """Give ``model`` the head, in place of its classifier.

        Raises:
            TypeError, ValueError: as :meth:`Backbone.of`; or a method was applied already.
        """
        backbone = Backbone.of(model)
        classes = self.classes(backbone.classes)
        head = Head2ToeHead(self, backbone, classes, next(model.parameters()))
        freeze(model)
        replace_classifier(model, backbone.head, head, classes)
        attach(model, backbone.blocks, backbone.head, head.reader)
        return Trained.of(model)


class PoolReader(Reader):
    """Averages the output of every block."""

    def __init__(self, depth: int, pool: int) -> None:
        super().__init__(depth, trains_backbone=False)
        self.pool = pool

    def block(self, block: ReadBlock, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with torch.no_grad():
            output = run(*args, **kwargs)
            self.now.gathered.append(pooled(tokens(output), self.pool))
        return output


def pooled(x: Tensor, count: int) -> Tensor:
    """x [B, N, D] -> means over ``count`` runs of the tokens, [B, count, D].

    Raises:
        ValueError: there are fewer tokens than that.
    """
    if count > x.shape[1]:
        raise ValueError(f"pool must be at most the {x.shape[1]} tokens of a block, got {count}")
    return F.adaptive_avg_pool1d(x.mT, count).mT


class Head2ToeHead(nn.Module):
    """Stands in the place of the model's classifier: features [B, F] -> logits [B, classes].

    Attributes:
        linear: the classifier, a :class:`ChunkedHead` on the feature and on each block's means.
    """

    def __init__(
        self, config: Head2ToeConfig, backbone: Backbone, num_classes: int, like: Tensor
    ) -> None:
        super().__init__()
        depth = len(backbone.blocks)
        self.linear = ChunkedHead(
            [backbone.features] + depth * [backbone.width * config.pool],
            num_classes,
            config.normalize,
            config.selected,
            dtype=like.dtype,
        )
        self.reader = PoolReader(depth, config.pool)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.chunks(features))

    def chunks(self, features: Tensor) -> list[Tensor]:
        """What the classifier reads: the feature [B, F], and of every block [B, pool D]."""
        found = self.reader.take()
        features = features.clone()  # a view of all tokens as a rule, which it must not keep alive
        return [features, *(z.flatten(1) for z in found)]
