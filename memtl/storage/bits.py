"""One bit an element, for masks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .._ops import ceil_div
from .format import Format, check_rebuild


@dataclasses.dataclass(frozen=True)
class Bits(Format):
    """Keep a bool tensor, exactly.

    Memory: ceil(numel / 8) bytes (``torch.bool`` takes numel).
    """

    kind: ClassVar[str] = "bits"

    def __post_init__(self) -> None:
        check_rebuild(self.rebuild)

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.memtl.bits_pack(x),)

    def unpack(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ones = torch.ones(shape, device=packed[0].device)
        return torch.ops.memtl.bits_apply(ones, packed[0], 1.0).to(dtype)

    def apply(self, packed: tuple[Tensor, ...], x: Tensor, scale: float = 1.0) -> Tensor:
        """x * scale where the mask is set, else 0."""
        return torch.ops.memtl.bits_apply(x, packed[0], scale)

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
