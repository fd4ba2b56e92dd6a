"""Scales and biases of the norms, and the classifier, train.

Mudrakarta, Sandler, Zhmoginov and Howard: K for the Price of 1: Parameter-efficient Multi-task and
Transfer Learning, ICLR 2019; the row "FT-Norm+Last" of TinyTL's tables.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from .base.partial import PartialConfig, parameters_outside
from .base.transfer import Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuningConfig(PartialConfig):
    """Every norm's scale and bias train, and the classifier.

    The gradient of a scale needs the input of its norm, which is therefore kept, whole: few
    parameters, much memory. ``FrozenConfig(norm=8)``, applied before, keeps it in 8 bits.

    Args:
        num_classes, convert, weight_bits: as in :class:`memtl.methods.base.partial.PartialConfig`.
    """

    method: ClassVar[str] = "norm_tuning"

    def apply(self, model: nn.Module) -> Trained:
        """Freeze ``model``, of any architecture, but for its norms and its classifier.

        Raises:
            TypeError, ValueError: as :meth:`PartialConfig.freeze`; or there is no norm with
                parameters.
        """
        norms = parameters_outside(model, lambda module, name: is_norm(module))
        if not norms:
            raise ValueError(f"this {type(model).__name__} has no norm with parameters")
        head = self.freeze(model)
        for parameter in norms:
            parameter.requires_grad_(True)
        return self.finish(model, head)


def is_norm(module: nn.Module) -> bool:
    """Whether the class of ``module``, torch's, a library's or a user's, is called a norm."""
    return any("norm" in cls.__name__.lower() for cls in type(module).__mro__)
