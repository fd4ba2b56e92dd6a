"""Packing of which nothing but sizes and types is wanted.

The first run of a checkpointed block is recorded by autograd, but what it would keep comes from the
second run. Packing then goes through the operators' fakes, and costs next to nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


class _State(threading.local):
    active = False


_state = _State()


@contextlib.contextmanager
def outlines(active: bool = True) -> Iterator[None]:
    """Inside, in this thread, :func:`outlined` gives outlines, or, not ``active``, the tensors."""
    before, _state.active = _state.active, active
    try:
        yield
    finally:
        _state.active = before


def outlined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What is to be packed: the tensors, or their sizes, strides and types alone."""
    if torch.compiler.is_compiling():  # it does not trace what is local to a thread
        return tensors
    return tuple(t.to("meta") for t in tensors) if _state.active else tensors
