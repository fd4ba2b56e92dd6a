"""exact(), stock(): for a while, converted layers keep everything as it is, or what torch does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..storage import Dense, Format
from .layers import Layer
from .swap import without


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


@contextlib.contextmanager
def stock(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of ``model`` runs the forward that it had before it was converted, and
    keeps what PyTorch keeps, be it needed or not; what methods added stays. Nothing is copied.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer's class was changed by others since (``fully_shard`` does).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    before = [(module, type(module)) for module in model.modules() if isinstance(module, Layer)]
    own = [without(cls, Layer) for _, cls in before]
    if changed := [cls for cls in own if issubclass(cls, Layer)]:
        raise ValueError(f"{changed[0].__name__} was put in front of a converted layer's class")
    try:
        for (module, _), cls in zip(before, own, strict=True):
            module.__class__ = cls
        yield
    finally:
        for module, cls in before:
            module.__class__ = cls


def _exact(kept: Format | dict[str, Format]) -> Format | dict[str, Format]:
    if isinstance(kept, dict):
        return {role: format if format.exact else Dense() for role, format in kept.items()}
    return kept if kept.exact else Dense()
