"""Transfer methods, one file each: a configuration that knows how to apply itself."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from ..nn import Report, unconvert
from .back_razor import BackRazorConfig
from .low_bit import LowBitConfig

__all__ = ["BackRazorConfig", "LowBitConfig", "MethodConfig", "apply", "unconvert"]


class MethodConfig(Protocol):
    """What a method brings."""

    def apply(self, model: nn.Module) -> Report:
        """Change ``model`` in place and say what was done."""
        ...


def apply(model: nn.Module, config: MethodConfig) -> Report:
    """Apply a method to ``model``, in place; the one entry point for every method.

    Args:
        model: any ``torch.nn.Module``.
        config: a method's configuration, such as :class:`BackRazorConfig`.

    Returns:
        A report; ``print`` it for the coverage table.

    Raises:
        TypeError: ``config`` is no method's configuration.
        ValueError: the method finds nothing to change in this model.
    """
    if not callable(getattr(config, "apply", None)) or isinstance(config, type):
        raise TypeError(
            f"config must be a method's configuration, memtl.BackRazorConfig() say, got {config!r}"
        )
    return config.apply(model)
