"""How far the target is from what the networks were pre-trained on, in their own features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..tasks import Split
from ..training.gap import domain_gap
from . import domain as domains
from .domain import Domain


@dataclasses.dataclass(frozen=True)
class Gap:
    """Distances of features: of the target's training images from source images, and, as what is
    zero with so few images, of source images from others."""

    target: float
    source: float


def gaps(domain: Domain, pretrainings: Iterable[str]) -> dict[str, Gap]:
    """Those of each network; nothing where there are no source images."""
    if not domain.has_source:
        return {}
    target, source = domains.task(domain).train, domains.source(domain)
    half, samples = len(source) // 2, len(target)
    halves = [
        Split(source.images[part], source.labels[part])
        for part in (slice(0, half), slice(half, 2 * half))
    ]
    found = {}
    for name in pretrainings:
        network = domain.source_network(name)
        pairs = ((source, target), (halves[0], halves[1]))
        found[name] = Gap(*(domain_gap(network, *pair, samples=samples) for pair in pairs))
    return found
