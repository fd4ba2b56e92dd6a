"""A linear classifier on the features of a frozen network."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

from .base.partial import PartialConfig
from .base.transfer import Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(PartialConfig):
    """The classifier trains and nothing else; the network stays in evaluation mode whatever
    ``train()`` says. Kept for backward is the feature alone, and what a classifier of several
    layers keeps.

    Args:
        num_classes, weight_bits: as in :class:`memtl.methods.base.partial.PartialConfig`.
        convert: as there; a linear classifier has no use for it.
    """

    method: ClassVar[str] = "linear_probe"
    convert: bool = False

    def apply(self, model: nn.Module) -> Trained:
        """Freeze ``model``, of any architecture, except for its classifier.

        Raises:
            TypeError, ValueError: as :meth:`PartialConfig.freeze`.
        """
        head = self.freeze(model)
        model.get_submodule(head).register_forward_pre_hook(copied, with_kwargs=True)
        return self.finish(model, head)


def copied(head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook: the feature is a view of all tokens as a rule, which it must not keep alive."""
    return tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
