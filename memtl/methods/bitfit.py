"""Biases and the classifier train, weights do not.

Ben-Zaken, Goldberg and Ravfogel: BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models, ACL 2022. Of a convolutional network it is what Cai, Gan,
Zhu and Han: TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning, NeurIPS 2020,
call TinyTL-B: a bias needs no activation for its gradient.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from .base.partial import PartialConfig, is_bias, parameters_outside
from .base.transfer import Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitConfig(PartialConfig):
    """Every bias trains, those of norms too, and the classifier.

    No bias needs anything for its gradient, so what is kept is what the gradient needs on its way
    through the network.

    Args:
        num_classes, convert, weight_bits: as in :class:`memtl.methods.base.partial.PartialConfig`.
    """

    method: ClassVar[str] = "bitfit"

    def apply(self, model: nn.Module) -> Trained:
        """Freeze ``model``, of any architecture, but for its biases and its classifier.

        Raises:
            TypeError, ValueError: as :meth:`PartialConfig.freeze`; or there is no bias outside the
                classifier.
        """
        biases = parameters_outside(model, is_bias)
        if not biases:
            raise ValueError(f"this {type(model).__name__} has no biases but its classifier's")
        head = self.freeze(model)
        for bias in biases:
            bias.requires_grad_(True)
        return self.finish(model, head)
