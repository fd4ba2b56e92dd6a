"""A few bits an element."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from .._ops import GROUP, ceil_div
from .format import Format, Packed, check_rebuild
from .outline import outlined

BITS = (8, 4, 3, 2)


@dataclasses.dataclass(frozen=True)
class Quantized(Format):
    """Keep 8, 4, 3 or 2 bits an element, rounded stochastically: the mean over seeds is exact.

    Args:
        bits: 8, 4, 3 or 2.
        range: None measures offset and scale for each group of 64 consecutive elements (bfloat16
            each). A pair (lo, hi) spreads 2**bits - 1 even levels over that fixed range, clamps to
            it and keeps no scale: the code for the derivatives of activation functions.
        seed: of the dither, which is a pure function of this seed and of the data.

    A group with anything that is not finite reads back as NaN; under a fixed range a NaN reads back
    as NaN and infinities as the ends of the range.

    Memory: ceil(numel / 64) * (8 * bits + 4) bytes, 4 less a group under a fixed range.
    """

    kind: ClassVar[str] = "quantized"
    bits: int = 4
    range: tuple[float, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_rebuild(self.rebuild)
        if self.bits not in BITS or type(self.bits) is not int:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise TypeError(f"seed must be a 64-bit integer, got {self.seed!r}")
        if self.range is not None:
            if not isinstance(self.range, (tuple, list)) or len(self.range) != 2:
                raise TypeError(f"range must be None or (lo, hi), got {self.range!r}")
            lo, hi = map(float, self.range)
            if not (lo < hi and math.isfinite(hi - lo)):
                raise ValueError(f"range must be (lo, hi), finite, lo < hi, got {self.range}")
            object.__setattr__(self, "range", (lo, hi))  # a list, from JSON

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.range is None:
            return torch.ops.memtl.quant_pack(x, self.bits, self.seed)
        return (torch.ops.memtl.quant_pack_range(x, self.bits, *self.range, self.seed),)

    def unpack(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self.range is None:
            return torch.ops.memtl.quant_unpack(*packed, self.bits, shape, dtype)
        return torch.ops.memtl.quant_unpack_range(*packed, self.bits, *self.range, shape, dtype)

    @property
    def precision(self) -> int:
        return 0 if self.range else self.bits

    @property
    def any_order(self) -> bool:
        return True

    def finer(self) -> Quantized:
        """Twice the bits or, from 3, the next that there are: 4 from 2, else 8."""
        return dataclasses.replace(self, bits=4 if self.bits == 2 else 8)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return ceil_div(shape.numel(), GROUP) * (8 * self.bits + (0 if self.range else 4))

    def __str__(self) -> str:
        return f"{self.bits}-bit{' fixed range' if self.range else ''}{self._once}"


def pack_normalized(
    x: Tensor, mean: Tensor, rstd: Tensor, inner: int, format: Format
) -> Packed | None:
    """(x - mean) * rstd in ``format``, packed in one pass over memory; flat element i has the
    mean (i // inner) % C of C. None where that is not what the format or the dtype asks for."""
    if type(format) is not Quantized or format.range is not None or inner == 0:
        return None
    if torch.float64 in (x.dtype, mean.dtype, rstd.dtype):
        return None
    given = outlined(x, mean, rstd)
    packed = torch.ops.memtl.quant_pack_normalized(*given, format.bits, inner, format.seed)
    return Packed(format, packed, x.shape, torch.float32)


def grouped(packed: Packed | None) -> tuple[Tensor, Tensor, int] | None:
    """Codes, params and bits, as the fused operators take them; None for what is kept otherwise
    than in groups with a scale of their own."""
    if packed is None or type(packed.format) is not Quantized or packed.format.range is not None:
        return None
    codes, params = packed.tensors
    return codes, params, packed.format.bits
