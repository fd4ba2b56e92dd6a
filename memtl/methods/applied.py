"""Applying a method, and what a model remembers of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import nn as layers
from .config import Config, ConversionConfig


def apply(model: nn.Module, config: Config) -> Any:
    """Apply a method to ``model``, in place; the one entry point for every method.

    Args:
        model: any ``torch.nn.Module``.
        config: a method's configuration, such as :class:`memtl.BackRazorConfig`.

    Returns:
        The method's report, to be printed: :class:`memtl.nn.Report` of a conversion, else
        :class:`memtl.methods.Trained`.

    Raises:
        TypeError: ``config`` is no method's configuration.
        ValueError: the method finds nothing to change in this model.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a method's configuration, memtl.BackRazorConfig() say, got {config!r}"
        )
    report = config.apply(model)
    record(model, (*applied(model), config.resolved(model)))
    return report


def unconvert(model: nn.Module) -> int:
    """Give every converted module its own class back; returns how many there were.

    Raises:
        ValueError: as :func:`memtl.nn.unconvert`.
    """
    count = layers.unconvert(model)
    record(model, tuple(c for c in applied(model) if not isinstance(c, ConversionConfig)))
    return count


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
    """The model inside torch.compile's and parallel wrappers to which a method was applied."""
    while not applied(model):
        inside = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inside, nn.Module):
            break
        model = inside
    return model
