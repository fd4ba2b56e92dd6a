"""What a model remembers of the methods that were applied to it."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .config import Config


def applied(model: nn.Module) -> tuple[Config, ...]:
    """What :func:`apply` was given for this model, wrapped or not, in that order, and the number of
    classes filled in where it was left open."""
    return unwrapped(model).__dict__.get("memtl_applied", ())


def record(model: nn.Module, configs: tuple[Config, ...]) -> None:
    """Make ``configs`` what :func:`applied` returns."""
    state = unwrapped(model).__dict__
    state.pop("memtl_applied", None)
    if configs:
        state["memtl_applied"] = configs


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch.compile, of parallel training and of peft.

    A wrapper adds no tensor to what it holds: a network with a layer called ``module`` is none.
    """
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def _inside(model: Any) -> nn.Module | None:
    base = getattr(model, "get_base_model", None)
    children = getattr(model, "_modules", {})
    for inside in (base and base(), children.get("_orig_mod"), children.get("module")):
        if not isinstance(inside, nn.Module) or inside is model:
            continue
        if isinstance(model, AveragedModel) or _tensors(model) == _tensors(inside):
            return inside
    return None


def _tensors(model: nn.Module) -> set[int]:
    return set(map(id, chain(model.parameters(), model.buffers())))
