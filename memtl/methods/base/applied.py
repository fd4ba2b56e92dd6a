"""Applying a method, and undoing a conversion."""

from __future__ import annotations

from typing import Any

from torch import nn

from ... import nn as layers
from ...nn.masked import is_shard
from .config import Config, ConversionConfig
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
            model, which is compiled, wrapped for parallel training or sharded already: what the
            method adds would train in each process by itself.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a method's configuration, memtl.BackRazorConfig() say, got {config!r}"
        )
    if isinstance(config, TransferConfig):
        if (then := _wrapping(model)) is not None:
            raise ValueError(f"apply the method first, {then} afterwards")
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
    report = config.apply(model)
    record(model, (*applied(model), config.resolved(model)))
    return report


def _wrapping(model: nn.Module) -> str | None:
    """What was done to ``model`` that has to come after a method which changes its parameters."""
    if hasattr(model, "_orig_mod"):
        return "torch.compile the model"
    if isinstance(getattr(model, "module", None), nn.Module) and hasattr(model, "no_sync"):
        return f"wrap the model in {type(model).__name__}"
    return "fully_shard the model" if any(map(is_shard, model.parameters())) else None


def unconvert(model: nn.Module) -> int:
    """Give every converted module its own class back; returns how many there were.

    Raises:
        ValueError: as :func:`memtl.nn.unconvert`.
    """
    count = layers.unconvert(model)
    record(model, tuple(c for c in applied(model) if not isinstance(c, ConversionConfig)))
    return count
