"""What of a model a ticket is about: its backbone, and the weights in that."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from ...nn.masked import is_masked
from ...nn.report import plain_name
from ..base.record import unwrapped

_HEADS = ("classifier", "head", "heads", "fc", "lm_head")
_MATRICES = ("weight",)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Holder(NamedTuple):
    """A module that has a weight, and under which name."""

    module: nn.Module
    key: str


class Weight(NamedTuple):
    """A weight of a backbone, and every module of the model that holds it."""

    parameter: nn.Parameter
    holders: tuple[Holder, ...]

    @property
    def embedding(self) -> bool:
        """Whether an embedding is among the holders."""
        return any(isinstance(h.module, (nn.Embedding, nn.EmbeddingBag)) for h in self.holders)

    @property
    def obstacle(self) -> str:
        """Why its numbers cannot be read or written, or ""."""
        if self.parameter.is_meta:
            return "is on the meta device"
        return "was made in inference mode" if self.parameter.is_inference() else ""

    @property
    def linear(self) -> bool:
        """Whether a linear layer, a convolution or an attention multiplies with it."""
        return any(h.key in _multiplied(h.module) for h in self.holders)

    @property
    def transposed(self) -> int | None:
        """As :func:`transposed` says of those that multiply with it; None if they disagree."""
        said = {transposed(h.module) for h in self.holders if h.key in _multiplied(h.module)}
        return said.pop() if len(said) == 1 else None


def transposed(module: nn.Module) -> int:
    """0 if the weights of ``module`` are [O, I / groups, ...], else its groups: they are
    [I, O / groups, ...]."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.groups
    return int(_is_conv1d(module))


def _multiplied(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return _MATRICES
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION
    return _MATRICES if _is_conv1d(module) else ()


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with its weight transposed."""
    return any(c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def inner_model(model: Any) -> Any:
    """The model inside the wrappers of torch.compile, of parallel training and of peft.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return unwrapped(model)


def check_unmasked(model: nn.Module) -> None:
    """Raise ValueError if ``model`` has a ticket."""
    if is_masked(model):
        raise ValueError(
            f"this {type(model).__name__} has a ticket: Ticket.of(model).remove(model) first"
        )


def backbone_of(model: Any) -> nn.Module:
    """What there is of ``model`` whatever its task: of a transformers model its base model, of any
    other the model itself (:func:`heads_of` are in it, but no part of it)."""
    base = getattr(model, "base_model", None) if hasattr(model, "base_model_prefix") else None
    return base if isinstance(base, nn.Module) else model


def heads_of(model: Any) -> list[nn.Module]:
    """The classifiers of ``model``: what timm says, else what is called so; of a sequence its last
    layer. Of a transformers model, whatever is outside the base model is a head too."""
    named = getattr(model, "get_classifier", None)
    if callable(named):
        found = named()
        found = list(found) if isinstance(found, (tuple, list)) else [found]
    else:
        found = [getattr(model, name, None) for name in _HEADS]
    heads = []
    for head in found:
        if isinstance(head, nn.Sequential):
            head = next((m for m in reversed(head) if _multiplied(m)), head)
        if isinstance(head, nn.Module):
            heads.append(head)
    return heads


def head_tensors(model: nn.Module) -> set[str]:
    """The names of parameters and buffers of ``model`` that are no part of its backbone; what both
    hold (tied embeddings) is the backbone's."""
    heads = {module for head in heads_of(model) for module in head.modules()}
    inside = {
        id(tensor)
        for module in backbone_of(model).modules()
        if module not in heads
        for tensor in (*module._parameters.values(), *module._buffers.values())
    }
    named = (*model.named_parameters(), *model.named_buffers())
    return {name for name, tensor in named if id(tensor) not in inside}


def named_weights(model: nn.Module) -> dict[str, Weight]:
    """Every weight of the backbone, by its name in there (the first one, if it is shared), but for
    those of the head, and for what is empty, is a single number or has no floating-point numbers.
    Vectors are among them, which are never drawn by themselves.

    Raises:
        ValueError: peft has put adapters into it, or parameters are not initialised yet.
    """
    for name, module in backbone_of(model).named_modules():
        if type(module).__module__.startswith("peft."):
            raise ValueError(f"draw and apply tickets before peft changes the model ({name})")
        if any(is_lazy(p) for p in module._parameters.values()):
            raise ValueError(f"the parameters of {name} are not initialised yet")
    holders: dict[int, list[Holder]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append(Holder(module, key))
    head = head_tensors(model)
    apart = {id(p) for name, p in model.named_parameters() if name in head}
    return {
        plain_name(name): Weight(p, tuple(holders[id(p)]))
        for name, p in backbone_of(model).named_parameters()
        if p.dim() and p.numel() and p.is_floating_point() and id(p) not in apart
    }


def weights_in_scope(model: nn.Module, scope: tuple[str, ...] | None) -> dict[str, Weight]:
    """The weights that :attr:`TicketConfig.scope` says.

    Raises:
        ValueError: there are none, a pattern matches none, or one matches an embedding's alone.
    """
    every = {n: w for n, w in named_weights(model).items() if w.parameter.dim() > 1}
    kind = type(model).__name__
    prunable = {name: weight for name, weight in every.items() if not weight.embedding}
    if scope is None:
        found = {name: weight for name, weight in prunable.items() if weight.linear}
        if not found:
            raise ValueError(f"this {kind} has no linear layer or convolution outside its head")
        return found
    chosen = set()
    for pattern in scope:
        matched = {name for name in every if fnmatchcase(name, pattern)}
        if matched and not matched & prunable.keys():
            raise ValueError(f"scope: {min(matched)!r} is an embedding's, which are never pruned")
        if not matched:
            raise ValueError(
                f"scope: {pattern!r} matches no weight of this {kind}, which has\n  "
                + "\n  ".join(prunable or ("none",))
            )
        chosen |= matched
    return {name: weight for name, weight in prunable.items() if name in chosen}
