"""One bit an element, for masks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .._ops import ceil_div
from .format import Format, check_rebuild
from .order import memory_order, unpermuted


@dataclasses.dataclass(frozen=True)
class Bits(Format):
    """Keep a bool tensor, exactly.

    Args:
        order: the dimensions, slowest first, in which bits follow each other, and in which what is
            unpacked lies in memory; None for row-major.

    Memory: ceil(numel / 8) bytes (``torch.bool`` takes numel).
    """

    kind: ClassVar[str] = "bits"
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_rebuild(self.rebuild)
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))
            if sorted(self.order) != list(range(len(self.order))):
                raise ValueError(f"order must be a permutation of dimensions, got {self.order}")

    @classmethod
    def like(cls, x: Tensor) -> Bits:
        """In the order in which x lies in memory."""
        if x.is_contiguous():
            return cls()
        if x.movedim(1, -1).is_contiguous() if x.dim() > 1 else False:
            return cls(order=(0, *range(2, x.dim()), 1))
        if torch.compiler.is_compiling():
            return cls()
        return cls(order=memory_order(x))

    def laid(self, x: Tensor) -> Tensor:
        """x with its dimensions in that order."""
        return x if self.order is None else x.permute(self.order)

    def _back(self, x: Tensor) -> Tensor:
        return x if self.order is None else unpermuted(x, self.order)

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.memtl.bits_pack(self.laid(x)),)

    def unpack(
        self,
        packed: tuple[Tensor, ...],
        shape: torch.Size,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> Tensor:
        kept = dtype if dtype.is_floating_point else torch.float32
        ones = torch.ones(shape, dtype=kept, device=packed[0].device)
        if self.order is not None:
            ones = ones.view([shape[d] for d in self.order])
        return self._back(torch.ops.memtl.bits_apply(ones, packed[0], scale).to(dtype))

    def apply(self, packed: tuple[Tensor, ...], x: Tensor, scale: float = 1.0) -> Tensor:
        """x * scale where the mask is set, else 0; in the layout of the mask."""
        return self._back(torch.ops.memtl.bits_apply(self.laid(x), packed[0], scale))

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return ceil_div(shape.numel(), 8)

    @property
    def precision(self) -> int:
        return 64

    @property
    def exact(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"1 bit{self._once}"
