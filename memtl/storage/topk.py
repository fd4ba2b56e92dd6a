"""The largest magnitudes with their positions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._ops import BLOCK, ceil_div
from .convolution import ConvGeometry
from .dense import DTYPES
from .format import Format, check_fraction, check_rebuild

if TYPE_CHECKING:
    from typing_extensions import Self

VALUES = {**DTYPES, "int8": torch.int8}
SCOPES = ("block", "sample")
DENSE_ELEMENTS = 2**19
"""Of a convolution's input, decoded at a time: stays in the caches, and is enough work a call."""
GPU_DENSE_ELEMENTS = 2**24
"""The same on a GPU, where a call has to be more than its launches."""


class _Layout(NamedTuple):
    """How a shape is cut into rows, and how many entries are kept."""

    rows: int
    n: int
    k: int
    k_tail: int
    kept: int
    bitmap: bool


@dataclasses.dataclass(frozen=True)
class TopK(Format):
    """Keep a fraction of the elements, those of largest magnitude; the rest reads back as zero.

    Args:
        keep: fraction kept, in (0, 1]; None leaves it to the configuration that uses the format.
        scope: ``"block"`` keeps ``round(keep * 256)`` of every 256 consecutive elements of the last
            dimension (at least one; a shorter last block its share). Constant sizes, nothing waits
            for the host. ``"sample"`` is Back Razor's definition (Jiang et al., NeurIPS 2022): one
            threshold over all elements of a sample (the first dimension is the batch),
            ``n - clip(int(n (1 - keep)), 1, n) + 1`` kept, ties cut to exactly that many.
        values: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"`` (a bfloat16 scale per block; the
            rounding error is at most half a step, 1/252 of the block's largest kept magnitude, a
            bfloat16 rounding more). NaN and infinities are always kept, and kept as such.

    Memory: a value and a one-byte position each, or, where that is smaller (above 12.5 % density),
    a bitmap of n / 8 bytes a row; int8 adds 2 bytes a block; ``scope="sample"`` 2 bytes a block.
    At keep 0.1 and 0.03 with int8 values and whole blocks: 1.69 and 0.56 bits an element.
    """

    kind: ClassVar[str] = "topk"
    keep: float | None = None
    scope: str = "block"
    values: str = "int8"

    def __post_init__(self) -> None:
        check_fraction("keep", self.keep)
        check_rebuild(self.rebuild)
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if self.values not in VALUES:
            raise ValueError(f"values must be one of {sorted(VALUES)}, got {self.values!r}")

    def resolve(self, keep: float) -> TopK:
        return self if self.keep is not None else dataclasses.replace(self, keep=keep)

    def _layout(self, shape: torch.Size) -> _Layout:
        if self.keep is None:
            raise ValueError("TopK.keep is not set: give a fraction in (0, 1]")
        if self.scope == "sample":
            rows = shape[0] if len(shape) > 1 else 1
            n = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
            # The paper's formula in r = 1 - keep; 1e-9 undoes the rounding of that difference.
            pruned = min(max(int(n * (1 - self.keep) + 1e-9), 1), n) if n else 1
            kept = n - pruned + 1 if n else 0
            return _Layout(rows, n, kept, 0, kept, 8 * kept > n)
        n = shape[-1] if len(shape) else 1
        k, k_tail = quota(BLOCK, self.keep), quota(n % BLOCK, self.keep)
        kept = n // BLOCK * k + k_tail
        rows = math.prod(shape[:-1])
        return _Layout(rows, n, k, k_tail, kept, kept > ceil_div(n, 8))

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, n, k, k_tail, _, bitmap = self._layout(x.shape)
        x = x.reshape(rows, n)
        if self.scope == "sample":
            return torch.ops.memtl.topk_pack_sample(x, k, VALUES[self.values], bitmap)
        packed = torch.ops.memtl.topk_pack(x, k, k_tail, VALUES[self.values], bitmap)
        return packed if self.values == "int8" else packed[:2]

    def _open(self, packed: tuple[Tensor, ...], bitmap: bool) -> tuple[Tensor, ...]:
        """values, positions, scale, counts, the absent ones empty."""
        values, positions, *rest = packed
        scale = rest[0] if rest else values.new_empty((0,), dtype=torch.bfloat16)
        counts = rest[1] if len(rest) > 1 else values.new_empty((0,), dtype=torch.int16)
        return values, positions, scale, counts

    def unpack(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        _, n, k, k_tail, _, bitmap = self._layout(shape)
        opened = self._open(packed, bitmap)
        return torch.ops.memtl.topk_unpack(*opened, n, k, k_tail, bitmap, dtype).view(shape)

    def weight_grad(
        self, packed: tuple[Tensor, ...], shape: torch.Size, grad_out: Tensor
    ) -> Tensor:
        _, n, k, k_tail, _, bitmap = self._layout(shape)
        opened = self._open(packed, bitmap)
        return torch.ops.memtl.topk_weight_grad(*opened, grad_out, n, shape[-1], k, k_tail, bitmap)

    def conv_weight_grad(
        self,
        packed: tuple[Tensor, ...],
        shape: torch.Size,
        grad_out: Tensor,
        input_size: Sequence[int],
        weight_size: Sequence[int],
        geometry: ConvGeometry,
        channels_last: bool,
    ) -> Tensor:
        """By the operator, which knows no groups, on a GPU, and on a CPU where that is faster
        (:func:`_sparse_is_faster`); else dense, a few samples at a time."""
        _, n, k, k_tail, kept, bitmap = self._layout(shape)
        if (
            geometry.groups == 1
            and not geometry.transposed
            and (grad_out.is_cuda or _sparse_is_faster(kept, n, weight_size, geometry))
        ):
            return torch.ops.memtl.topk_conv_weight_grad(
                *self._open(packed, bitmap),
                grad_out,
                input_size,
                weight_size[2:],
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                channels_last,
                k,
                k_tail,
                bitmap,
            )
        arguments = (input_size, weight_size, geometry, channels_last)
        return self.library_conv_weight_grad(packed, shape, grad_out, *arguments)

    def library_conv_weight_grad(
        self,
        packed: tuple[Tensor, ...],
        shape: torch.Size,
        grad_out: Tensor,
        *arguments: Any,
    ) -> Tensor:
        """Dense, a few samples at a time, so that never the whole batch's input is."""
        if shape[0] == 0:
            return super().conv_weight_grad(packed, shape, grad_out, *arguments)
        at_once = GPU_DENSE_ELEMENTS if grad_out.is_cuda else DENSE_ELEMENTS
        each = max(1, at_once // max(1, shape[1]))
        total: Tensor | None = None
        for i in range(0, shape[0], each):
            rows = tuple(t[i : i + each] if t.numel() else t for t in packed)
            size = torch.Size((min(each, shape[0] - i), shape[1]))
            part = super().conv_weight_grad(rows, size, grad_out[i : i + each], *arguments)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        rows, n, _, _, kept, bitmap = self._layout(shape)
        blocks = ceil_div(n, BLOCK)
        per_row = kept * VALUES[self.values].itemsize + (ceil_div(n, 8) if bitmap else kept)
        per_row += 2 * blocks * (self.values == "int8") + 2 * blocks * (self.scope == "sample")
        return rows * per_row

    def __str__(self) -> str:
        keep = "" if self.keep is None else f" {100 * self.keep:g}%"
        scope = "/sample" if self.scope == "sample" else ""
        return f"topk{keep} {self.values}{scope}{self._once}"


@dataclasses.dataclass(frozen=True)
class WithTopK(Format):
    """The base of formats that keep a :class:`TopK` and something beside it."""

    keep: float | None = None
    values: str = "int8"

    def __post_init__(self) -> None:
        check_rebuild(self.rebuild)
        self.topk  # noqa: B018  (made here: torch.compile does not trace its checks)

    @functools.cached_property
    def topk(self) -> TopK:
        """Blocks of 256, ``keep`` of each."""
        return TopK(self.keep, values=self.values)

    def resolve(self, keep: float) -> Self:
        return self if self.keep is not None else dataclasses.replace(self, keep=keep)


def _sparse_is_faster(
    kept: int, n: int, weight_size: Sequence[int], geometry: ConvGeometry
) -> bool:
    """Whether a CPU gets a convolution's weight gradient faster from ``kept`` of n entries than
    from decoded samples, by what was measured with AVX-512, AVX2 and portable code.

    An entry is sorted once and then multiplied with every output it meets. Many outputs pay for
    the sorting: with 64 (256 -> 64 channels, 1x1) up to a density of about 0.25, with 24 of 0.1,
    with 16 of 0.07; with hundreds, up to 0.3 and more.
    """
    outputs = weight_size[0] * math.prod(weight_size[2:]) / math.prod(geometry.stride)
    return kept <= n * min(0.3, outputs / 230)


def quota(length: int, keep: float) -> int:
    """Entries kept of a block of ``length`` elements: the nearest integer, at least one."""
    return max(1, math.floor(keep * length + 0.5)) if length else 0
