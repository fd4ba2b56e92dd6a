"""The order in which the dimensions of a tensor lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def memory_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x, slowest first."""
    return tuple(sorted(range(x.dim()), key=x.stride, reverse=True))


def unpermuted(x: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor of which x is ``permute(order)``; a view."""
    return x.permute(sorted(range(x.dim()), key=order.__getitem__))
