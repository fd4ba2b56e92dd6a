"""exact(): for a while, converted layers keep what they keep as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..storage import Dense, Format
from .layers import Layer


@contextlib.contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, every gradient of ``model`` is that of the unconverted model: its layers keep by
    reference (:class:`memtl.storage.Dense`) what they otherwise keep in fewer bits. Nothing is
    copied, and a model that is not converted stays as it is.

    Args:
        model: any module; methods may have changed it, and ``torch.compile`` may have wrapped it
            (it compiles once more).

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    before = []
    for module in model.modules():
        own = vars(module)
        if not isinstance(module, Layer):
            continue
        # Of a layer, by role of the functions that it calls, of a checkpointed block's input.
        for name in ("memtl_format", "memtl_formats", "memtl_input"):
            if name in own:
                before.append((module, name, own[name]))
    try:
        for module, name, kept in before:
            setattr(module, name, _exact(kept))
        yield
    finally:
        for module, name, kept in before:
            setattr(module, name, kept)


def _exact(kept: Format | dict[str, Format]) -> Format | dict[str, Format]:
    if isinstance(kept, dict):
        return {role: format if format.exact else Dense() for role, format in kept.items()}
    return kept if kept.exact else Dense()
