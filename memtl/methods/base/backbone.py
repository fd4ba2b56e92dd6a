"""What the methods for vision transformers know of a model: its blocks, its classifier."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.bytecode import calls_of
from ...nn.swap import original_class


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The parts of a vision transformer.

    Attributes:
        blocks: names of the attention blocks, in the order in which they run.
        width: features of a token.
        head: name of the classifier.
        features: what the classifier reads of a sample.
        classes: what it returns; None where there is none yet (an ``Identity``).
        patch: numbers in a patch: channels times height times width.
    """

    blocks: tuple[str, ...]
    width: int
    head: str
    features: int
    classes: int | None
    patch: int

    @classmethod
    def of(cls, model: nn.Module) -> Backbone:
        """Find the parts of ``model``: one of timm's or transformers' vision transformers, or a
        network built alike (blocks in one list, a classifier called ``head`` or ``classifier``).

        Raises:
            TypeError: ``model`` is no module.
            ValueError: a part is not to be found.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        blocks = attention_blocks(model)
        width = _token_width(model.get_submodule(blocks[0]))
        name, features, classes = linear_classifier(model, width)
        return cls(blocks, width, name, features, classes, _patch(model))


def attention_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks of a transformer: the members of the one list, each of which takes the
    tokens and calls ``F.scaled_dot_product_attention`` in one place.

    Raises:
        ValueError: there is no such list, or several (networks in stages), or tokens change their
            width on the way.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module)
        and all(_attends(block) == 1 and _takes_tokens_alone(block) for block in module)
    ]
    kind = type(model).__name__
    if not found:
        raise ValueError(
            f"this {kind} has no attention blocks: no list of modules, each of which calls "
            "F.scaled_dot_product_attention"
        )
    if len(found) > 1:
        raise ValueError(
            f"this {kind} has {len(found)} lists of attention blocks ({', '.join(found)}), but the "
            "method needs one, through which the same tokens pass"
        )
    blocks = dict(model.get_submodule(found[0]).named_children())
    if len(widths := {_token_width(block) for block in blocks.values()}) > 1:
        raise ValueError(f"the tokens of this {kind} have several widths: {sorted(widths)}")
    return tuple(f"{found[0]}.{name}" for name in blocks)


def _takes_tokens_alone(block: nn.Module) -> bool:
    """Class attention, say, takes patches and class token one by one."""
    _, *parameters = inspect.signature(original_class(block).forward).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) <= 1


def _attends(block: nn.Module) -> int:
    return sum(F.scaled_dot_product_attention in calls_of(m) for m in block.modules())


def classifier(model: Any) -> tuple[str, Any]:
    """Name and module of what turns features into logits.

    Raises:
        ValueError: there is none, or several.
    """
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(head, (tuple, list, nn.ModuleList)):
        raise ValueError(
            f"this {type(model).__name__} has {len(head)} classifiers, whose logits it adds up "
            "(one for its teacher, in distillation): a method gives it one"
        )
    if head is None:
        head = getattr(model, "classifier", None) or getattr(model, "head", None)
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        raise ValueError(
            f"this {type(model).__name__} has no classifier: no get_classifier(), .classifier or "
            ".head"
        )
    return name, head


def linear_classifier(model: Any, width: int | None = None) -> tuple[str, int, int | None]:
    """Name of the classifier, what it reads of a sample (``width`` if nothing else tells) and what
    it returns, None where there is none yet (an ``Identity``).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no classifier or another one, or what it reads is not to be told.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    name, head = classifier(model)
    if isinstance(head, nn.Linear):
        return name, head.in_features, head.out_features
    if not isinstance(head, nn.Identity):
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        hint = "; leave it to the method: no modules_to_save" if kind.startswith("peft.") else ""
        raise ValueError(f"expected a linear classifier, but {name} is {kind}{hint}")
    config = getattr(model, "config", None)
    for holder, size in (
        (model, "head_hidden_size"),
        (model, "num_features"),
        (config, "hidden_size"),
    ):
        if isinstance(value := getattr(holder, size, None), int):
            return name, value, None
    if width is None:
        raise ValueError(f"cannot tell how many features {name} of {type(model).__name__} reads")
    return name, width, None


def linear_of(head: Any) -> Any:
    """The linear layer in a classifier: itself, or its ``linear`` where it reads many layers."""
    return head if isinstance(head, nn.Linear) else head.linear


def _token_width(block: nn.Module) -> int:
    for module in block.modules():
        shape = getattr(module, "normalized_shape", None)
        if shape is not None:
            return int(shape[-1])
    raise ValueError(f"cannot tell the width of a token: no norm in a {type(block).__name__}")


def _patch(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return math.prod(module.weight.shape[1:])
    raise ValueError(f"cannot tell the size of a patch of this {type(model).__name__}")


def uniform_like_patches(backbone: Backbone, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """New tokens for a transformer: Xavier's uniform initialisation of its patch embedding."""
    bound = math.sqrt(6 / (backbone.patch + backbone.width))
    return nn.init.uniform_(torch.empty(shape, dtype=dtype), -bound, bound)
