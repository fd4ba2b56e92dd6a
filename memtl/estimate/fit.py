"""What fits into a memory: the largest batch, from predictions alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from .predict import Prediction

POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
MOST = 2**20  # samples of a batch that anybody asks for
FIRST = 8
TRIES = 8  # along straight lines, before the range is halved


def memory(text: str) -> int:
    """Bytes, of "8GiB", "8 GB" or "8000MB".

    Raises:
        ValueError: it is not a number above 0 with a unit of bytes.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"memory must be a number and a unit, as 8GiB or 8000MB, got {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** POWERS[found[2]])


def largest_batch(
    predict_at: Callable[[int], Prediction], budget: int, most: int = MOST
) -> Prediction | None:
    """The prediction of the largest batch whose peak is within ``budget`` bytes, of at most
    ``most`` samples; None where not even one sample's is.

    A peak grows with the batch almost along a straight line, which says where to look next. What is
    returned was predicted, and so was the batch with one sample more, which does not fit.
    """
    known: dict[int, Prediction] = {}
    low, high = 0, most + 1  # fits, and does not
    size = min(FIRST, most)
    while high - low > 1:
        try:
            known[size] = predict_at(size)
        except ValueError:
            if size == 1 and known:  # a batch norm in training takes two samples at least
                break
            raise
        if known[size].peak <= budget:
            low = size
        else:
            high = size
        size = _next(known, low, high, budget)
    return known.get(low)


def _next(known: Mapping[int, Prediction], low: int, high: int, budget: int) -> int:
    """Where to look between ``low`` and ``high``."""
    if low == 0:
        return high // 2
    if len(known) == 1:
        return min(2 * low, high - 1)
    if len(known) > TRIES:
        return (low + high) // 2
    other = high if high in known else max(size for size in known if size < low)
    slope = (known[other].peak - known[low].peak) / (other - low)
    reach = low + int((budget - known[low].peak) / slope) if slope > 0 else high
    return min(max(reach, low + 1), high - 1)
