"""A linear classifier on the features of a frozen network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from .backbone import linear_classifier
from .freezing import evaluate_all_but, freeze
from .transfer import Trained, TransferConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(TransferConfig):
    """The classifier trains and nothing else; the network stays in evaluation mode whatever
    ``train()`` says. Kept for backward is the feature alone.

    Args:
        num_classes: of a new classifier; None to train the model's own.
    """

    method: ClassVar[str] = "linear_probe"

    def apply(self, model: nn.Module) -> Trained:
        """Freeze ``model``, of any architecture, except for its classifier.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: no linear classifier is to be found, or a method was applied already.
        """
        head, features, own = linear_classifier(model)
        classes = self.classes(own)
        freeze(model)
        self.classify(model, head, features, classes)
        model.get_submodule(head).register_forward_pre_hook(copied)
        evaluate_all_but(model, head)
        return Trained.of(model)


def copied(head: nn.Module, args: tuple) -> tuple:
    """A hook: the feature is a view of all tokens as a rule, which it must not keep alive."""
    return (args[0].clone(), *args[1:])
