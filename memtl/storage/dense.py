"""The tensor itself, or a copy of it in a narrower floating-point type."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .format import Format, check_rebuild

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclasses.dataclass(frozen=True)
class Dense(Format):
    """Keep the tensor: by reference (``dtype=None``, exact), or cast to fp32, bf16 or fp16.

    Memory: none of its own by reference (the tensor stays alive), else numel times the cast's size.
    """

    kind: ClassVar[str] = "dense"
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_rebuild(self.rebuild)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be None or one of {sorted(DTYPES)}, got {self.dtype!r}")

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x if self.dtype is None else x.to(DTYPES[self.dtype]),)

    def unpack(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return packed[0].to(dtype)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * (DTYPES[self.dtype] if self.dtype else dtype).itemsize

    @property
    def precision(self) -> int:
        return 8 * DTYPES[self.dtype].itemsize if self.dtype else 64

    @property
    def exact(self) -> bool:
        return self.dtype is None

    def __str__(self) -> str:
        return f"dense{' ' + self.dtype if self.dtype else ''}{self._once}"
