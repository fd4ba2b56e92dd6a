"""Patterns of sparsity: which weights survive or fall together.

Rows, kernels and channels as in Mao, Han, Pool, Li, Liu, Wang and Dally: Exploring the Granularity
of Sparsity in Convolutional Neural Networks, CVPR Workshops 2017; of N:M, 2:4 is what NVIDIA's
sparse tensor cores multiply (Mishra et al.: Accelerating Sparse Deep Neural Networks, 2021).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

UNSTRUCTURED = "unstructured"
GROUPED = ("row", "kernel", "channel")


class Layout(NamedTuple):
    """Where the channels of a weight are; behind them come the dimensions of its kernel, if any."""

    shape: tuple[int, ...]
    """[O, I, ...] or [groups, I, O, ...], the weight's own but for the groups."""
    outputs: tuple[int, ...]
    """The dimensions that say which output channel it is."""
    inputs: int
    """The dimension of input channels (of those in a group)."""

    @staticmethod
    def of(shape: Sequence[int], transposed: int = 0) -> Layout:
        """Of a weight [O, I, ...], or, if ``transposed``, of [I, O, ...] in so many groups."""
        if not transposed:
            return Layout(tuple(shape), (0,), 1)
        return Layout((transposed, shape[0] // transposed, *shape[1:]), (0, 2), 1)

    def grouped(self, pattern: str) -> tuple[int, ...]:
        """The dimensions along which weights are in one group."""
        dims = tuple(range(len(self.shape)))
        kernel = dims[len(self.outputs) + 1 :]
        channel = tuple(dim for dim in dims if dim not in self.outputs)
        return {"row": kernel[-1:], "kernel": kernel, "channel": channel}.get(pattern, ())

    def groups(self, pattern: str) -> tuple[int, ...]:
        """The shape, with 1 for those dimensions."""
        grouped = self.grouped(pattern)
        return tuple(1 if dim in grouped else size for dim, size in enumerate(self.shape))


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """N and M of "N:M"; None if the pattern is no such thing."""
    found = re.fullmatch("([1-9][0-9]*):([1-9][0-9]*)", pattern)
    return (int(found[1]), int(found[2])) if found else None


def check_fit(pattern: str, layouts: Mapping[str, Layout]) -> None:
    """Raise unless every weight has whole groups of inputs.

    Raises:
        ValueError: naming all that have not.
    """
    _, m = n_of_m(pattern) or (1, 1)
    sizes = {name: layout.shape[layout.inputs] for name, layout in layouts.items()}
    if wrong := [f"{name} has {size}" for name, size in sizes.items() if size % m]:
        raise ValueError(
            f"the pattern {pattern!r} needs numbers of inputs divisible by {m}, but "
            f"{', '.join(wrong)}: scope can leave weights out"
        )


@torch.no_grad()
def pattern_masks(
    scores: Sequence[Tensor],
    layouts: Sequence[Layout],
    sparsity: float,
    pattern: str,
    level: str,
    given: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The bits of what survives, for every tensor of scores.

    A group is worth the mean magnitude of its scores. The lowest are pruned, as many as have not
    more elements than an unstructured mask of that sparsity prunes; of equal ones the last first,
    in the order of the tensors and, inside one, of its elements.

    Args:
        scores: finite, of a weight's shape each; their signs do not matter.
        layouts: of those weights.
        sparsity: in [0, 1); N:M, whose sparsity is fixed, does not read it.
        pattern, level: as of :class:`memtl.TicketConfig`, but not "unstructured".
        given: bits of the groups that there are still, uint8 [ceil(numel / 8)]; None: all.

    Returns:
        uint8 [ceil(numel / 8)] each, on the devices of ``scores``.

    Memory: the bits; at work a copy of a tensor or two, and a float32 (float64 if one of the scores
    is) for every group, of all tensors together where level is "global".
    """
    double = any(s.dtype == torch.float64 for s in scores)
    wide = torch.float64 if double else torch.float32
    every = range(len(scores))

    def worth(i: int) -> Tensor:
        return _worth(scores[i], layouts[i], pattern, wide, None if given is None else given[i])

    if counts := n_of_m(pattern):
        found = (_largest(worth(i), layouts[i].inputs, *counts) for i in every)
        return [torch.ops.memtl.bits_pack(kept) for kept in found]
    bits = []
    for together in [every] if level == "global" else [[i] for i in every]:
        groups = [worth(i) for i in together]
        sizes = [scores[i].numel() // g.numel() for i, g in zip(together, groups, strict=True)]
        budget = round(sparsity * sum(scores[i].numel() for i in together))
        for i, kept in zip(together, _highest(groups, sizes, budget), strict=True):
            bits.append(torch.ops.memtl.bits_pack(kept.expand(layouts[i].shape)))
    return bits


def random_scores(
    layouts: Sequence[Layout], pattern: str, generator: torch.Generator
) -> list[Tensor]:
    """Scores by which any group is as likely to survive as any other."""
    return [
        torch.rand(layout.groups(pattern), generator=generator).expand(layout.shape)
        for layout in layouts
    ]


def shuffled_mask(bits: Tensor, layout: Layout, pattern: str, generator: torch.Generator) -> Tensor:
    """The bits of as many groups of that pattern, but any; of N:M as many in every M."""
    mask = unpacked(bits, layout.shape)
    if counts := n_of_m(pattern):
        dim = layout.inputs
        mask = mask.unflatten(dim, (-1, counts[1]))
        order = torch.rand(mask.shape, generator=generator).argsort(dim + 1)
        return torch.ops.memtl.bits_pack(mask.gather(dim + 1, order))
    groups = mask.amax(layout.grouped(pattern), keepdim=True) if layout.grouped(pattern) else mask
    order = torch.randperm(groups.numel(), generator=generator)
    groups = groups.flatten()[order].view(groups.shape)
    return torch.ops.memtl.bits_pack(groups.expand(layout.shape))


def surviving_channels(bits: Tensor, layout: Layout) -> Tensor:
    """Which output channels have a weight left, bool [outputs]."""
    return unpacked(bits, layout.shape).amax(layout.grouped("channel")).flatten()


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask, bool of that shape."""
    return torch.ops.memtl.bits_apply(torch.ones(shape, device=bits.device), bits, 1.0) != 0


def _worth(
    scores: Tensor, layout: Layout, pattern: str, dtype: torch.dtype, given: Tensor | None
) -> Tensor:
    """The mean magnitude of every group, :meth:`Layout.groups`; -1 if it is pruned already."""
    worth = scores.detach().reshape(layout.shape).abs()
    grouped = layout.grouped(pattern)  # none: mean would be over all dimensions
    worth = worth.mean(grouped, keepdim=True, dtype=dtype) if grouped else worth.to(dtype)
    if given is not None:
        there = unpacked(given, layout.shape)
        there = there.amax(grouped, keepdim=True) if grouped else there
        worth = torch.where(there, worth, -1)
    return worth.contiguous()


def _largest(worth: Tensor, dim: int, n: int, m: int) -> Tensor:
    """Where the n largest of every m consecutive ones along ``dim`` are; of equal ones the first.

    Every two places are compared: of a few, that is a sixth of the time of sorting."""
    places = [place.contiguous() for place in worth.unflatten(dim, (-1, m)).unbind(dim + 1)]
    larger = [torch.zeros(places[0].shape, dtype=torch.int16, device=worth.device) for _ in places]
    for j in range(m):
        for i in range(j):
            later = places[j] > places[i]
            larger[i] += later
            larger[j] += ~later
    kept = torch.stack([count < n for count in larger], dim + 1).flatten(dim, dim + 1)
    return kept & (worth >= 0)


def _highest(groups: list[Tensor], sizes: list[int], budget: int) -> list[Tensor]:
    """Where the groups are that survive when the lowest, of that many elements each, are pruned as
    long as ``budget`` elements last; of equal ones the last first."""
    # Bits of numbers that are not negative are in their order, those of -1 are below zero. So the
    # first number that cannot go as a whole is found by halving the range of bits: nothing is
    # joined or sorted.
    whole = torch.int64 if groups[0].dtype == torch.float64 else torch.int32
    keys = [g.view(whole) for g in groups]

    def below(key: int) -> int:
        return sum(n * int((k < key).count_nonzero()) for k, n in zip(keys, sizes, strict=True))

    low, high = 0, max(int(k.amax()) for k in keys)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if below(middle) <= budget else (low, middle - 1)
    left = max(budget - below(low), 0)
    kept = [k >= low for k in keys]
    for mask, k, size in reversed(list(zip(kept, keys, sizes, strict=True))):
        equal = (k == low).flatten().nonzero().flatten()
        fall = min(len(equal), left // size)
        mask.view(-1)[equal[len(equal) - fall :]] = False
        left = left - fall * size if fall == len(equal) else 0
    return kept
