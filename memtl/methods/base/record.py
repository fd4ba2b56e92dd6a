"""What a model remembers of the methods that were applied to it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import Config


def applied(model: nn.Module) -> tuple[Config, ...]:
    """What :func:`apply` was given for this model, in that order, and the number of classes filled
    in where it was left open."""
    return model.__dict__.get("memtl_applied", ())


def record(model: nn.Module, configs: tuple[Config, ...]) -> None:
    """Make ``configs`` what :func:`applied` returns."""
    model.__dict__.pop("memtl_applied", None)
    if configs:
        model.__dict__["memtl_applied"] = configs


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch.compile, of parallel training and of peft."""
    while not applied(model):
        base = getattr(model, "get_base_model", None)
        inside = base() if base else getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inside, nn.Module) or inside is model:
            break
        model = inside
    return model
