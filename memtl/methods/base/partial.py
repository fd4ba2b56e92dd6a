"""What methods share that train parts of a frozen network and keep what that needs and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from ...nn import convert
from ...nn.layers import Layer
from ...nn.weights import check_weights, compress_weights
from ..frozen import FrozenConfig
from .backbone import classifier, linear_classifier
from .freezing import evaluate_all_but, freeze
from .transfer import Trained, TransferConfig, check_flag, check_module


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartialConfig(TransferConfig):
    """The base of methods that train parts of a network, anywhere in it, and its classifier.

    The network itself stays in evaluation mode whatever ``train()`` says: its batch norms normalise
    with the statistics that they have, and do not change them.

    Args:
        num_classes: of a new linear classifier; None to train the model's own, of any kind (a head
            that classifies every pixel, say).
        convert: let every layer keep what gradients need and no more, as
            :class:`memtl.FrozenConfig` does; a model that is converted already is left as it is.
            Without it the layers keep what PyTorch keeps.
        weight_bits: None, or 8 to store weights that do not train in 8 bits, rounded: the only
            option here that changes what the network computes.
    """

    convert: bool = True
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("convert", self.convert)
        if self.weight_bits not in (None, 8):
            raise ValueError(f"weight_bits must be None or 8, got {self.weight_bits!r}")

    def resolved(self, model: nn.Module) -> TransferConfig:
        """With the number of classes, where the classifier is a linear one."""
        head = classifier(model)[1]
        if not isinstance(head, nn.Linear):
            return self
        return dataclasses.replace(self, num_classes=head.out_features)

    def freeze(self, model: nn.Module) -> str:
        """Freeze ``model`` but for its classifier, a new one where there is to be one; returns the
        classifier's name.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: there is no classifier, or none that can be replaced; or a method that
                trains a part of the model was applied already.
        """
        check_module(model)
        name, head = classifier(model)
        if self.weight_bits is not None:
            check_weights(model, set(head.modules()))
        wrapped = type(head).__module__.startswith("peft.")
        if self.num_classes is None and not wrapped and any(True for _ in head.parameters()):
            freeze(model)
            head.requires_grad_(True)
            return name
        name, features, own = linear_classifier(model)
        classes = self.classes(own)
        freeze(model)
        self.classify(model, name, features, classes)
        return name

    def finish(self, model: nn.Module, *trained: str) -> Trained:
        """Once it is decided what trains: what the options ask for. The modules of the names
        ``trained`` follow ``train()``, the rest does not."""
        if self.weight_bits is not None:
            compress_weights(model, self.weight_bits)
        if self.convert and not any(isinstance(module, Layer) for module in model.modules()):
            convert(model, FrozenConfig().formats())
        evaluate_all_but(model, *trained)
        return Trained.of(model)


def parameters_outside(
    model: nn.Module, wanted: Callable[[nn.Module, str], bool]
) -> list[nn.Parameter]:
    """The parameters of ``model``, but for its classifier's, for which ``wanted`` says so of the
    module that they belong to and of their name there.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no classifier.
    """
    check_module(model)
    head = set(classifier(model)[1].parameters())
    found = [
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if wanted(module, name) and parameter not in head
    ]
    return list(dict.fromkeys(found))


def is_bias(module: nn.Module, name: str) -> bool:
    """Whether that parameter of ``module`` is a bias: what it adds, a norm's too."""
    return name.endswith("bias")
