"""A sign an element, a mean magnitude a group, and the largest few as they are."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._ops import GROUP, ceil_div
from .topk import WithTopK


@dataclasses.dataclass(frozen=True)
class SignMean(WithTopK):
    """Keep the largest magnitudes as :class:`TopK` does, and of the rest the sign and the mean
    magnitude of every group.

    A group is 64 consecutive elements of the flat tensor. What is not among the largest reads back
    as its sign (+ for zero) times the mean magnitude of those of its group.

    Args:
        keep: fraction kept as it is, in (0, 1]; None leaves it to the configuration.
        values: as for :class:`TopK`, whose blocks of 256 these are.

    NaN and infinities are kept first. A group with more of them than there was room for, or whose
    mean is beyond bfloat16, reads back as NaN.

    Memory: that of ``TopK``, a bit an element, and 2 bytes for every group: at the default keep of
    0.03, with int8 values and whole blocks, 1.81 bits an element.
    """

    kind: ClassVar[str] = "sign"
    keep: float | None = 0.03

    def _is_kept(self, largest: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        """Which elements are among the largest, whatever their stored value."""
        ones = torch.ones_like(largest[0], dtype=torch.bfloat16)
        return self.topk.unpack((ones, largest[1]), shape, torch.bfloat16) != 0

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        largest = self.topk.pack(x)
        rest = ~self._is_kept(largest, x.shape)
        magnitude = torch.where(rest, x.float().abs(), 0.0)
        mean = (_groups(magnitude).sum(-1) / _groups(rest).sum(-1).clamp_min(1)).bfloat16()
        mean = mean.masked_fill(~mean.isfinite(), math.nan)
        return *largest, torch.ops.memtl.bits_pack(x >= 0), mean

    def unpack(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        *largest, positive, mean = packed
        kept = tuple(largest)
        each = mean.float().repeat_interleave(GROUP)[: shape.numel()].view(shape)
        sign = torch.ops.memtl.bits_apply(torch.ones_like(each), positive, 2.0) - 1
        exact = self.topk.unpack(kept, shape, torch.float32)
        return torch.where(self._is_kept(kept, shape), exact, sign * each).to(dtype)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        signs, means = ceil_div(shape.numel(), 8), 2 * ceil_div(shape.numel(), GROUP)
        return self.topk.nbytes(shape, dtype) + signs + means

    def __str__(self) -> str:
        return f"sign + {self.topk}{self._once}"


def _groups(x: Tensor) -> Tensor:
    """[G, 64], the last group filled with zeros."""
    flat = x.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
