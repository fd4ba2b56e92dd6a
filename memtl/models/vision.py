"""Image classifiers of transformers as functions of images alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .bert import Wrapped


class ImageClassifier(Wrapped):
    """An image classifier of transformers whose input is images, its output logits.

    Args:
        model: a ``...ForImageClassification``.
        pretrained_cfg: what images it takes, as timm says it: ``input_size``, ``mean``, ``std``.
    """

    def __init__(self, model: Any, pretrained_cfg: dict[str, Any]):
        super().__init__(model)
        self.pretrained_cfg = self.default_cfg = pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        """images ``[n, C, H, W]``, normalised -> logits ``[n, classes]``."""
        return self.model(pixel_values=images).logits
