"""The head of VQT: the queries of every block, and the classifier that reads what they found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, uniform_like_patches
from ..head import ChunkedHead
from .reader import JACOBIAN_DTYPES, QueryReader

if TYPE_CHECKING:
    from .config import VQTConfig

COMBINES = ("concat", "mean", "weighted")


class VQTHead(nn.Module):
    """Stands in the place of the model's classifier: features [B, F] -> logits [B, classes].

    Attributes:
        queries: [blocks, T, D].
        weights: [blocks, T], of the sum over the T rows of a block, or None.
        linear: the classifier, a :class:`ChunkedHead` on the feature and on each block's.
    """

    def __init__(
        self, config: VQTConfig, backbone: Backbone, num_classes: int, like: Tensor
    ) -> None:
        super().__init__()
        depth, width, t = len(backbone.blocks), backbone.width, config.num_queries
        self.combine = config.combine
        self.dropout = config.dropout
        queries = uniform_like_patches(backbone, (depth, t, width), like.dtype)
        self.queries = nn.Parameter(queries)
        weighted = config.combine == "weighted"
        self.weights = nn.Parameter(torch.ones(depth, t, dtype=like.dtype)) if weighted else None
        size = width * t if config.combine == "concat" else width
        self.linear = ChunkedHead(
            [backbone.features] + depth * [size],
            num_classes,
            config.normalize,
            config.selected,
            dtype=like.dtype,
        )
        self.reader = QueryReader(
            depth,
            config.train_backbone,
            config.keep,
            JACOBIAN_DTYPES[config.jacobian_dtype],
            self.queries_of,
        )

    def queries_of(self, index: int, batch: int) -> Tensor:
        """P_m for every sample, [B, T, D]; in training each has its own dropout."""
        queries = self.queries[index].expand(batch, -1, -1)
        return F.dropout(queries, self.dropout, self.training)

    def forward(self, features: Tensor) -> Tensor:
        if self.reader.noted is not None:
            self.reader.noted.features = features.clone()
            return features
        return self.linear(self.chunks(features))

    def chunks(self, features: Tensor) -> list[Tensor]:
        """What the classifier reads: the feature [B, F], and of every block [B, T D] or [B, D]."""
        found = self.reader.take()
        features = features.clone()  # a view of all tokens as a rule, which it must not keep alive
        if self.combine == "concat":
            return [features, *(z.flatten(1) for z in found)]
        if self.combine == "mean":
            return [features, *(z.mean(1) for z in found)]
        assert self.weights is not None
        return [features, *(w @ z for w, z in zip(self.weights, found, strict=True))]
