"""A part of the training data for validation, where the data has none of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def stratified(
    labels: Sequence[int], classes: Sequence[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Positions to train on and to validate on: of every class ``fraction`` is for validation, at
    least one sample and not all.

    Raises:
        ValueError: a class, which is named, has fewer than two samples.
    """
    generator = torch.Generator().manual_seed(seed)
    places: list[list[int]] = [[] for _ in classes]
    for position, label in enumerate(labels):
        places[label].append(position)
    val: list[int] = []
    for name, members in zip(classes, places, strict=True):
        if len(members) < 2:
            raise ValueError(
                f"class {name!r} has {len(members)} sample{'s' * (len(members) != 1)}: a part for "
                "validation needs two at least, one to train on and one to validate on; or give "
                "validation data"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        order = torch.randperm(len(members), generator=generator)[:count]
        val += [members[i] for i in order.tolist()]
    chosen = set(val)
    return [i for i in range(len(labels)) if i not in chosen], sorted(val)
