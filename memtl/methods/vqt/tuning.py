"""Visual Query Tuning: a head on what queries in every block read; nothing else trains."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional.query_attention import KEEPS
from ..base.backbone import Backbone, uniform_like_patches
from ..base.freezing import freeze
from ..base.head import ChunkedHead
from ..base.reading import attach
from ..base.transfer import (
    Trained,
    TransferConfig,
    check_count,
    check_flag,
    check_probability,
    replace_classifier,
)
from .reader import JACOBIAN_DTYPES, Keep, QueryReader

COMBINES = ("concat", "mean", "weighted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQTConfig(TransferConfig):
    """Queries P_m [T, D] for each block m of a frozen vision transformer, and a linear head.

    Z'_m = Block_m(queries P_m, keys and values of the tokens Z_{m-1}): the queries pass through the
    frozen block beside the tokens, attend to them and not to each other, and end there. The head
    reads the model's own feature and every Z'_m, each normalised to length 1. The tokens are
    those of the unmodified model, bit for bit; nothing is kept of them for backward, and the model
    stays in evaluation mode whatever ``train()`` says. Nor does an input get a gradient. (All of
    this without ``train_backbone``.)

    Args:
        num_queries: T, of every block.
        dropout: probability with which an entry of P_m is dropped in training.
        combine: what the head reads of the T rows of Z'_m: all ("concat"), their "mean", or a
            learned sum ("weighted").
        normalize: whether each part that the head reads is normalised.
        keep, jacobian_dtype: as in :func:`memtl.functional.query_attention`, the latter "fp32" or
            "bf16".
        train_backbone: leave training what else of the model requires a gradient: for VQT on top
            of VPT, AdaptFormer, LoRA or a converted model. The queries then read tokens that
            change, but send no gradient into them; the backbone is trained by the model's own
            feature, and where the queries pass through what trains in a block, by them too.
        selected: number of features that the head reads, by group lasso; set by
            :func:`memtl.select_features`.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: T < 1, or another value outside its range.
    """

    method: ClassVar[str] = "vqt"
    networks: ClassVar[str] = "vision transformers"
    num_queries: int = 1
    dropout: float = 0.1
    combine: Literal["concat", "mean", "weighted"] = "concat"
    normalize: bool = True
    keep: Keep = "auto"
    jacobian_dtype: Literal["fp32", "bf16"] = "fp32"
    train_backbone: bool = False
    selected: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_queries", self.num_queries)
        check_probability("dropout", self.dropout)
        check_flag("normalize", self.normalize)
        check_flag("train_backbone", self.train_backbone)
        if self.selected is not None:
            check_count("selected", self.selected)
        for name, values in (
            ("combine", COMBINES),
            ("keep", KEEPS),
            ("jacobian_dtype", tuple(JACOBIAN_DTYPES)),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")

    def apply(self, model: nn.Module) -> Trained:
        """Give ``model`` the queries and the head, in place of its classifier.

        Raises:
            TypeError, ValueError: as :meth:`Backbone.of`; or something reads the model already.
        """
        backbone = Backbone.of(model)
        classes = self.classes(backbone.classes)
        head = VQTHead(self, backbone, classes, next(model.parameters()))
        if self.train_backbone:
            model.get_submodule(backbone.head).requires_grad_(False)  # it goes
        else:
            freeze(model)
        replace_classifier(model, backbone.head, head, classes)
        attach(model, backbone.blocks, backbone.head, head.reader)
        return Trained.of(model)


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
