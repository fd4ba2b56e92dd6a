"""The configuration of Visual Query Tuning, and how it is applied."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import nn

from ...functional.query_attention import KEEPS
from ..backbone import Backbone
from ..frozen import freeze
from ..reading import attach
from ..transfer import (
    Trained,
    TransferConfig,
    check_count,
    check_flag,
    check_probability,
    replace_classifier,
)
from .head import COMBINES, VQTHead
from .reader import JACOBIAN_DTYPES, Keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQTConfig(TransferConfig):
    """Queries P_m [T, D] for each block m of a frozen vision transformer, and a linear head.

    Z'_m = Block_m(queries P_m, keys and values of the tokens Z_{m-1}): the queries pass through the
    frozen block beside the tokens, attend to them and not to each other, and end there. The head
    reads the model's own feature and every Z'_m, each normalised to length 1. The tokens are
    those of the unmodified model, bit for bit; nothing is kept of them for backward, and the model
    stays in evaluation mode whatever ``train()`` says.

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
