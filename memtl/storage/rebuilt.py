"""Tensors that are not kept but made again from what is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .dense import Dense
from .format import Format, Packed, pack
from .order import memory_order, unpermuted

Recipe = Callable[..., Tensor]
"""A frozen dataclass without tensors; called with the parts, dense, it gives the tensor.

It may have a method ``decode(parts, shape, dtype)`` that makes the tensor of the parts as they are
packed, in one pass over memory, or returns None for parts it does not know so. From parts that are
exact, in the dtypes they had, it gives every bit of the tensor.
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """What :class:`Packed` says of one part, without its tensors, of which there are ``count``."""

    format: Format
    shape: torch.Size
    dtype: torch.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class Rebuilt(Format):
    """Stands for a tensor that is rebuilt from ``parts`` by ``recipe``; made by :func:`rebuilt`.

    It cannot be chosen: a layer's output is rebuilt only from what that layer keeps.

    Memory: none of its own.
    """

    recipe: Recipe = torch.clone
    parts: tuple[Part | None, ...] = ()

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        raise TypeError("nothing is packed as Rebuilt: it is made from what a layer keeps")

    def unpack(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parts = self.split(packed)
        decode = getattr(self.recipe, "decode", None)
        if decode is not None and (made := decode(parts, shape, dtype)) is not None:
            return made
        if self.exact:  # in the precision of the forward, for the very bits that it gave
            return self.recipe(*(None if p is None else p.unpack() for p in parts)).to(dtype)
        own = getattr(self.recipe, "sums_in_float32", False)  # by itself, of fewer bits
        wide = dtype if own else torch.promote_types(dtype, torch.float32)
        dense = (
            None if p is None else p.unpack(wide if p.dtype.is_floating_point else None)
            for p in parts
        )
        return self.recipe(*dense).to(dtype)

    def split(self, packed: tuple[Tensor, ...]) -> list[Packed | None]:
        """The parts, each with its tensors."""
        parts: list[Packed | None] = []
        start = 0
        for part in self.parts:
            if part is None:
                parts.append(None)
                continue
            tensors = packed[start : start + part.count]
            start += part.count
            parts.append(Packed(part.format, tensors, part.shape, part.dtype))
        return parts

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return 0

    @property
    def precision(self) -> int:
        return min(part.format.precision for part in self.parts if part is not None)

    @property
    def exact(self) -> bool:
        return all(part.format.exact for part in self.parts if part is not None)

    def __str__(self) -> str:
        return "rebuilt"


def rebuilt(
    recipe: Recipe, *parts: Packed | Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> Packed:
    """The tensor of that shape which ``recipe`` makes of ``parts``; a tensor among them is kept by
    reference, exactly."""
    packed = [
        Packed(Dense(), (p,), p.shape, p.dtype) if isinstance(p, Tensor) else p for p in parts
    ]
    specs = (
        None if p is None else Part(p.format, p.shape, p.dtype, len(p.tensors)) for p in packed
    )
    tensors = tuple(t for p in packed if p is not None for t in p.tensors)
    return Packed(Rebuilt(recipe=recipe, parts=tuple(specs)), tensors, shape, dtype)


@dataclasses.dataclass(frozen=True)
class View:
    """A view of the rebuilt tensor, which lay in memory with ``base_stride``."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    base_stride: tuple[int, ...]

    def __call__(self, base: Tensor) -> Tensor:
        if base.stride() != self.base_stride:
            base = torch.empty_strided(
                base.shape, self.base_stride, dtype=base.dtype, device=base.device
            ).copy_(base)
        return base.as_strided(self.size, self.stride, self.offset)


@dataclasses.dataclass(frozen=True)
class Permuted:
    """A tensor packed in the order in which it lay in memory, and which lies so again.

    ``order``: its dimensions, slowest first: the part has them so, and is row-major.
    """

    order: tuple[int, ...]

    def __call__(self, part: Tensor) -> Tensor:
        return self.back(part)

    def decode(
        self, parts: Sequence[Packed | None], shape: torch.Size, dtype: torch.dtype
    ) -> Tensor | None:
        """In the format's own precision."""
        (part,) = parts
        return None if part is None else self.back(part.unpack(dtype))

    def laid(self, x: Tensor) -> Tensor:
        """x with its dimensions in that order."""
        return x.permute(self.order)

    def back(self, x: Tensor) -> Tensor:
        """:meth:`laid` undone."""
        return unpermuted(x, self.order)

    @classmethod
    def like(cls, x: Tensor) -> Permuted | None:
        """How x lies in memory; None where it is row-major, or has gaps, or is traced by
        ``torch.compile``, which lays tensors out itself."""
        if x.is_contiguous() or torch.compiler.is_compiling():
            return None
        order = memory_order(x)
        return cls(order) if x.permute(order).is_contiguous() else None

    def of(self, part: Packed, shape: torch.Size) -> Packed:
        """What stands for the tensor of that shape, ``part`` being :meth:`laid` of it."""
        return rebuilt(self, part, shape=shape, dtype=part.dtype)


def pack_as_laid(x: Tensor, format: Format) -> Packed:
    """``x`` in ``format``, in the order in which it lies in memory where the format has none of its
    own: it is not copied for that, nor does what is unpacked lie otherwise."""
    permuted = Permuted.like(x) if format.any_order and not hasattr(x, "placements") else None
    if permuted is None:
        return pack(x, format)
    return permuted.of(pack(permuted.laid(x), format), x.shape)


def laid(packed: Packed) -> tuple[Packed, Permuted | None]:
    """What was packed, and how its dimensions were permuted for that, if they were."""
    format = packed.format
    if not isinstance(format, Rebuilt) or not isinstance(format.recipe, Permuted):
        return packed, None
    (part,) = format.split(packed.tensors)
    assert part is not None
    return part.to(packed.dtype), format.recipe
