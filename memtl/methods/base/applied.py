"""Applying a method, and undoing a conversion."""

from __future__ import annotations

from typing import Any

from torch import nn

from ... import nn as layers
from ...nn.masked import is_shard
from .config import Config
from .record import applied, record, unwrapped
from .transfer import TransferConfig, check_module

_FIRST = "apply the method first, or load first"


def apply(model: nn.Module, config: Config) -> Any:
    """Apply a method to ``model``, in place; the one entry point for every method.

    Args:
        model: any ``torch.nn.Module``; a model wrapped by peft stands for the one inside where the
            method trains a part of it. Such a method comes before ``torch.compile``, parallel
            wrappers and sharding, which would not know of the parameters that it makes.
        config: a method's configuration, such as :class:`memtl.BackRazorConfig`.

    Returns:
        The method's report, to be printed: :class:`memtl.nn.Report` of a conversion, else
        :class:`memtl.methods.Trained`.

    Raises:
        TypeError: ``config`` is no method's configuration, or ``model`` no module.
        ValueError: the method finds nothing to change in this model; or it trains a part of the
            model, which is compiled, wrapped for parallel training or sharded already: what the
            method adds would train in each process by itself.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a method's configuration, memtl.BackRazorConfig() say, got {config!r}"
        )
    check_module(model)
    if isinstance(config, TransferConfig):
        if hasattr(model, "_orig_mod"):
            raise ValueError("apply the method first, torch.compile the model afterwards")
        check_local(model)
        model = unwrapped(model)
    report = config.apply(model)
    record(model, (*applied(model), config.resolved(model)))
    return report


def check_local(model: nn.Module) -> None:
    """Raise unless all of ``model`` is in this process, and no gradient is shared with others yet.

    Raises:
        ValueError: it is in DistributedDataParallel, or sharded.
    """
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(f"{_FIRST}; DistributedDataParallel afterwards")
    if any(map(is_shard, model.parameters())):
        raise ValueError(f"{_FIRST}; fully_shard afterwards")


def unconvert(model: nn.Module) -> int:
    """Give every converted or checkpointed module its own class back; returns how many there were.

    Raises:
        ValueError: as :func:`memtl.nn.unconvert`.
    """
    count = layers.unconvert(model)
    record(model, tuple(c for c in applied(model) if not c.is_undone))
    return count
