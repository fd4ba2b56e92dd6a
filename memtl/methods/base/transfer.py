"""What methods share that train a small part of a model: classifiers, counts, what they own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...nn.report import plain_name
from ...nn.weights import compressed
from .backbone import classifier, linear_of
from .config import Config
from .record import applied

_METHODS = __name__.removesuffix(".base.transfer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig(Config):
    """The base of methods that train a small part of a model and a classifier.

    Args:
        num_classes: of a new classifier; None for as many as the model's own has.
    """

    num_classes: int | None = None

    def __post_init__(self) -> None:
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)

    def classes(self, own: int | None) -> int:
        """``num_classes``, or those of the model's own classifier."""
        if (classes := self.num_classes or own) is None:
            raise ValueError("num_classes must be given: this model has no classifier of its own")
        return classes

    def resolved(self, model: nn.Module) -> Config:
        """With the number of classes, for a model whose own classifier has another."""
        classes = len(linear_of(classifier(model)[1]).weight)
        return dataclasses.replace(self, num_classes=classes)

    def classify(self, model: nn.Module, name: str, features: int, classes: int) -> None:
        """Let the classifier of that name train: a new one, unless ``num_classes`` is None."""
        own = model.get_submodule(name)
        if self.num_classes is None and isinstance(own, nn.Linear):
            own.requires_grad_(True)
            return
        head = nn.Linear(features, classes, dtype=next(model.parameters()).dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        replace_classifier(model, name, head, classes)


def check_module(model: nn.Module) -> None:
    """Raise unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_count(name: str, value: int) -> None:
    """Raise unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_flag(name: str, value: bool) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_probability(name: str, value: float) -> None:
    """Raise unless 0 <= ``value`` < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a method trains: name and shape of every parameter, and the size of the whole model.
    ``print`` it."""

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    total: int

    @classmethod
    def of(cls, model: nn.Module) -> Trained:
        """The parameters of ``model`` that require a gradient."""
        trained = ((n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad)
        codes = {layer.weight_codes for layer in compressed(model).values()}
        return cls(tuple(trained), sum(t.numel() for t in (*model.parameters(), *codes)))

    @property
    def count(self) -> int:
        """Numbers that train."""
        return sum(torch.Size(shape).numel() for _, shape in self.parameters)

    def __str__(self) -> str:
        share = 100 * self.count / max(1, self.total)
        summary = (
            f"trainable params: {self.count:,} || all params: {self.total:,} || "
            f"trainable%: {share:.4f}"
        )
        lines = [summary]
        groups: dict[tuple[str, tuple[int, ...]], int] = {}
        for name, shape in self.parameters:
            key = (re.sub(r"\b\d+\b", "*", name), shape)
            groups[key] = groups.get(key, 0) + 1
        width = max((len(name) for name, _ in groups), default=0)
        for (name, shape), count in groups.items():
            times = f"  x{count}" if count > 1 else ""
            lines.append(f"  {name:{width}}  {list(shape)}{times}")
        return "\n".join(lines)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of that name, on the device and in the training mode of the
    model."""
    parent, _, child = name.rpartition(".")
    reference = next(model.parameters())
    module.to(reference.device).train(model.training)
    setattr(model.get_submodule(parent), child, module)


def replace_classifier(model: nn.Module, name: str, head: nn.Module, classes: int) -> None:
    """Put ``head`` in the place of the classifier of that name."""
    replace(model, name, head)
    # What timm and transformers believe it is; the latter's losses go by the configuration.
    for holder in (model, getattr(model, "config", None)):
        for count in ("num_classes", "num_labels"):
            if isinstance(getattr(holder, count, None), int):
                setattr(holder, count, classes)


def owned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What has to be kept of a trained model, by name: the parameters that train; all that a method
    made, frozen since or not; persistent buffers (running statistics, which a norm that somebody
    put into training mode has changed; the index of selected features). Weights in 8 bits are
    frozen, and no buffers, but for those of what a method made."""
    modules = model.named_modules()
    made = [plain_name(n) for n, m in modules if type(m).__module__.startswith(_METHODS)]
    if any(isinstance(config, TransferConfig) for config in applied(model)):
        made.append(plain_name(classifier(model)[0]))
    inside = tuple(f"{name}." for name in made)
    # By object: wrappers put other prefixes into the names of parameters than into state_dict().
    parameters = {p for p in model.parameters() if p.requires_grad}
    coded = {plain_name(name) for name in compressed(model)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        plain = plain_name(name)
        own = tensor in parameters or plain.startswith(inside)
        if own or not (isinstance(tensor, nn.Parameter) or plain in coded):
            yield name, tensor.detach()
