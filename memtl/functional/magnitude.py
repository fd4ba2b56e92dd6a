"""The largest magnitudes of many tensors at once: what pruning by magnitude keeps of a network.

One threshold for all tensors, found without joining or copying them. Exactly k elements survive:
where several equal the threshold, the first ones do, in the order of the tensors and, inside one,
of its elements (row by row, however it lies in memory). NaN is larger than any number: it survives,
and shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import check_tensors, sizes


class Threshold(NamedTuple):
    """What the k largest magnitudes are at least, and how many of those equal to it are of them."""

    value: Tensor
    """0-dim, of the tensors' dtype: the k-th largest magnitude; inf for k = 0."""
    ties: Tensor
    """int64 [number of tensors]."""


def count_bits(bits: Tensor) -> int:
    """How many bits are set in a tensor of bits, uint8. (On a GPU this waits for it.)

    Raises:
        TypeError: bits are no tensor of uint8.

    Memory: nothing is kept; at work a few times the bits, which are an eighth of a byte an element.
    """
    _check_uint8("count_bits", "bits", bits)
    pairs = bits - (bits >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return int(((fours + (fours >> 4)) & 0x0F).sum())


@torch.no_grad()
def magnitude_threshold(
    tensors: Sequence[Tensor], k: int, masks: Sequence[Tensor] | None = None
) -> Threshold:
    """The k-th largest magnitude of all elements of ``tensors`` together.

    Args:
        tensors: of any shapes, of one floating-point dtype, on one device; not empty.
        k: from 0 to the number of elements (of those in ``masks``).
        masks: for every tensor the bits of its elements that take part, uint8 [ceil(numel / 8)],
            least significant bit first, 0 behind the last element; None: all of them.

    Raises:
        TypeError: something is no tensor of such a dtype, or k no int.
        ValueError: there are no tensors, k is out of range, or masks do not fit.

    Memory: nothing is kept; at work less than 1 MB beside the tensors (on a CPU, those that are not
    contiguous are copied, one at a time).
    """
    return _threshold("magnitude_threshold", tensors, k, masks)


@torch.no_grad()
def magnitude_masks(
    tensors: Sequence[Tensor], k: int, masks: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """For every tensor the bits of its elements among the k largest magnitudes of all together.

    Arguments and errors are those of :func:`magnitude_threshold`. Exactly k bits are set, each of
    them in ``masks`` too.

    Memory: the bits, uint8 [ceil(numel / 8)] a tensor.
    """
    value, ties = _threshold("magnitude_masks", tensors, k, masks)
    if k == 0:  # not even what is above infinity
        return [t.new_zeros(-(-t.numel() // 8), dtype=torch.uint8) for t in tensors]
    given = masks if masks is not None else [None] * len(tensors)
    return [
        torch.ops.memtl.threshold_mask(t, mask, value, count)
        for t, mask, count in zip(tensors, given, ties, strict=True)
    ]


def _threshold(
    name: str, tensors: Sequence[Tensor], k: int, masks: Sequence[Tensor] | None
) -> Threshold:
    tensors, masks = _checked_list(name, "tensors", tensors), _checked_list(name, "masks", masks)
    if not tensors:
        raise ValueError(f"{name}: expected one tensor or more, got none")
    check_tensors(name, **{f"tensors[{i}]": t for i, t in enumerate(tensors)})
    for i, t in enumerate(tensors):
        if t.dtype != tensors[0].dtype:
            raise TypeError(
                f"{name}: expected tensors of one dtype, got {tensors[0].dtype} and, in "
                f"tensors[{i}], {t.dtype}"
            )
        if t.device != tensors[0].device:
            raise ValueError(
                f"{name}: expected tensors on one device, got {tensors[0].device} and, in "
                f"tensors[{i}], {t.device}"
            )
    _check_masks(name, tensors, masks)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{name}: k must be an int, got {type(k).__name__}")
    most = sum(map(count_bits, masks)) if masks else sum(t.numel() for t in tensors)
    if not 0 <= k <= most:
        raise ValueError(f"{name}: expected k from 0 to {most}, as there are elements, got {k}")
    return Threshold(*torch.ops.memtl.threshold_magnitude(tensors, masks, k))


def _checked_list(name: str, argument: str, given: Sequence[Tensor] | None) -> list[Tensor]:
    if isinstance(given, Tensor) or not isinstance(given, Sequence | None):
        raise TypeError(
            f"{name}: {argument} must be a sequence of tensors, got {type(given).__name__}"
        )
    return list(given or ())


def _check_masks(name: str, tensors: list[Tensor], masks: list[Tensor]) -> None:
    if len(masks) not in (0, len(tensors)):
        raise ValueError(
            f"{name}: expected a mask for each of {len(tensors)} tensors, got {len(masks)}"
        )
    for i, (t, mask) in enumerate(zip(tensors, masks, strict=False)):
        _check_uint8(name, f"masks[{i}]", mask)
        wanted = -(-t.numel() // 8)
        if tuple(mask.shape) != (wanted,) or mask.device != t.device:
            raise ValueError(
                f"{name}: expected masks[{i}] [{wanted}] on {t.device} for tensors[{i}] "
                f"{sizes(t)}, got {sizes(mask)} on {mask.device}"
            )


def _check_uint8(name: str, argument: str, bits: Tensor) -> None:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        got = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"{name}: {argument} must be a tensor of uint8, got {got}")
