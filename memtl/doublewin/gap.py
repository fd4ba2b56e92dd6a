"""How far the target is from what the networks were pre-trained on, in their own features."""

from __future__ import annotations

from collections.abc import Iterable

from ..training.gap import domain_gap
from . import domain as domains
from .domain import Domain


def gaps(domain: Domain, pretrainings: Iterable[str]) -> dict[str, float]:
    """Of each network, the distance of its features of the target's training images from those of
    source images; nothing where there are no source images."""
    if not domain.has_source:
        return {}
    target, source = domains.task(domain).train, domains.source(domain)
    return {name: domain_gap(domain.source_network(name), source, target) for name in pretrainings}
