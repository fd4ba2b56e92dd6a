"""Channels by number: which are one and the same, and which have to stay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Numbering:
    """Numbers of channels. Those that are united stay together, or go together."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._stay: set[int] = set()

    def new(self, count: int) -> Tensor:
        """So many new numbers, int64."""
        start = len(self._parents)
        self._parents += range(start, start + count)
        return torch.arange(start, start + count)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Make each of ``a`` the same as that of ``b``."""
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            self._parents[self._root(i)] = self._root(j)

    def keep(self, ids: Tensor) -> None:
        """Say that these stay."""
        self._stay.update(ids.tolist())

    def settle(self, tied: Iterable[Tensor]) -> Tensor:
        """By number, whether it stays, bool; of each in ``tied`` one at least does."""
        roots = torch.tensor([self._root(i) for i in range(len(self._parents))], dtype=torch.long)
        stays = torch.zeros(len(roots), dtype=torch.bool)
        stays[roots[list(self._stay)]] = True
        for ids in tied:  # who is kept here may be in others, which have enough then all the more
            if not stays[roots[ids]].any():
                stays[roots[ids[0]]] = True
        return stays[roots]

    def _root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = self._parents[self._parents[i]]
            i = self._parents[i]
        return i
