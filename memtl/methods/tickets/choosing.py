"""Masks, from weights or their scores: the largest, or random ones, each or in a pattern."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from ...functional import count_bits, magnitude_masks
from .config import TicketConfig
from .masks import random_masks
from .patterns import UNSTRUCTURED, Layout, pattern_masks, random_scores

Masks = dict[str, Tensor]


def draw_masks(
    weights: dict[str, Tensor],
    config: TicketConfig,
    transposed: dict[str, int],
    sparsity: float,
    masks: Masks | None = None,
) -> Masks:
    """Masks of that sparsity, among the survivors of ``masks``, on the CPU.

    Args:
        weights: or their scores, by name.
        transposed: as :attr:`Ticket.transposed`.

    Raises:
        ValueError: no weight survives in one of them.
    """
    found = choose_masks(weights, config, transposed, sparsity, masks)
    drawn = {name: bits.cpu() for name, bits in found.items()}
    if empty := [name for name, bits in drawn.items() if not count_bits(bits)]:
        raise ValueError(
            f"at a sparsity of {sparsity:g} no weight at all survives in {', '.join(empty)}: "
            "prune less, or level='layer'"
        )
    return drawn


def choose_masks(
    weights: dict[str, Tensor],
    config: TicketConfig,
    transposed: dict[str, int],
    sparsity: float,
    masks: Masks | None = None,
) -> Masks:
    """As :func:`draw_masks`, where the weights are, and some may lose all."""
    if config.pattern == UNSTRUCTURED:
        return _unstructured(weights, config, sparsity, masks)
    return _patterned(weights, config, transposed, sparsity, masks)


def ranked_together(weights: Iterable[str], config: TicketConfig) -> list[list[str]]:
    """The names of weights that are ranked together."""
    return [list(weights)] if config.level == "global" else [[name] for name in weights]


def _patterned(
    weights: dict[str, Tensor],
    config: TicketConfig,
    transposed: dict[str, int],
    sparsity: float,
    masks: Masks | None,
) -> Masks:
    layouts = [Layout.of(w.shape, transposed.get(name, 0)) for name, w in weights.items()]
    scores = list(weights.values())
    if config.scheme == "random":
        generator = torch.Generator().manual_seed(config.seed)
        scores = random_scores(layouts, config.pattern, generator)
    given = None if masks is None else [masks[n].to(w.device) for n, w in weights.items()]
    found = pattern_masks(scores, layouts, sparsity, config.pattern, config.level, given)
    return dict(zip(weights, found, strict=True))


def _unstructured(
    weights: dict[str, Tensor], config: TicketConfig, sparsity: float, masks: Masks | None
) -> Masks:
    generator = torch.Generator().manual_seed(config.seed)
    chosen: Masks = {}
    for group in ranked_together(weights, config):
        tensors = [weights[name] for name in group]
        sizes = [t.numel() for t in tensors]
        kept = sum(sizes) - round(sparsity * sum(sizes))
        if config.scheme == "random":
            found = random_masks(sizes, kept, generator)
        else:
            wide = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
            given = None if masks is None else [masks[n].to(weights[n].device) for n in group]
            found = magnitude_masks([t.to(wide) for t in tensors], kept, given)
        chosen.update(zip(group, found, strict=True))
    return chosen
