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
        """Of a weight [O, I, ...], or, transposed in so many groups, [groups * I, O, ...]."""
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
    wide = torch.float32
    if any(s.dtype == torch.float64 for s in scores):
        wide = torch.float64
    masks = [None] * len(scores) if given is None else given

    def worth(i: int) -> Tensor:
        return _worth(scores[i], layouts[i], pattern, wide, masks[i])

    if counts := n_of_m(pattern):
        kept = (_largest(worth(i), layouts[i].inputs, *counts) for i in range(len(scores)))
        return [torch.ops.memtl.bits_pack(mask) for mask in kept]
    sizes = [s.numel() // _product(layout.groups(pattern)) for s, layout in zip(scores, layouts, strict=True)]
    every = range(len(scores))
    bits = []
    for together in [every] if level == "global" else [[i] for i in every]:
        budget = round(sparsity * sum(scores[i].numel() for i in together))
        found = _highest([worth(i).flatten() for i in together], [sizes[i] for i in together], budget)
        for i, mask in zip(together, found, strict=True):
            mask = mask.view(layouts[i].groups(pattern)).expand(layouts[i].shape)
            bits.append(torch.ops.memtl.bits_pack(mask))
    return bits
