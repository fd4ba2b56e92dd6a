"""Applying a method, and undoing a conversion."""

from __future__ import annotations

from typing import Any

from torch import nn

from ... import nn as layers
from .config import Config
from .record import applied, record
from .transfer import TransferConfig


def apply(model: nn.Module, config: Config) -> Any:
    """Apply a method to ``model``, in place; the one entry point for every method.

    Args:
        model: any ``torch.nn.Module``; a model wrapped by peft stands for the one inside where the
            method trains a part of it.
        config: a method's configuration, such as :class:`memtl.BackRazorConfig`.

    Returns:
        The method's report, to be printed: :class:`memtl.nn.Report` of a conversion, else
        :class:`memtl.methods.Trained`.

    Raises:
        TypeError: ``config`` is no method's configuration.
        ValueError: the method finds nothing to change in this model; or it trains a part of the
            model, which is compiled already.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a method's configuration, memtl.BackRazorConfig() say, got {config!r}"
        )
    if isinstance(config, TransferConfig):
        if hasattr(model, "_orig_mod"):
            raise ValueError("apply the method first, torch.compile the model afterwards")
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
    report = config.apply(model)
    record(model, (*applied(model), config.resolved(model)))
    return report


def unconvert(model: nn.Module) -> int:
    """Give every converted or checkpointed module its own class back; returns how many there were.

    Raises:
        ValueError: as :func:`memtl.nn.unconvert`.
    """
    count = layers.unconvert(model)
    record(model, tuple(c for c in applied(model) if not c.is_undone))
    return count
