"""Learned masks: weights stay as they were pre-trained, and what is learned is which are used.

Ramanujan, Wortsman, Kembhavi, Farhadi and Rastegari: What's Hidden in a Randomly Weighted Neural
Network?, CVPR 2020 (edge-popup). Sehwag, Wang, Mittal and Jana: HYDRA: Pruning Adversarially Robust
Neural Networks, NeurIPS 2020 (scores that begin with the weights). Fu, Yu, Zhang et al.: Robust
Tickets Can Transfer Better, DAC 2023 (LMP: such masks as tickets).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.scored import score_weights
from ...nn.weights import compressed
from .scope import Weight

Tensors = dict[str, Tensor]


def check_scorable(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Raise unless weights can have scores.

    Raises:
        ValueError: some are in 8 bits, or one is a recurrent layer's.
    """
    if found := list(compressed(model)):
        raise ValueError(
            f"{found[0]} is in 8 bits, where scores reach no weight: memtl.nn.expand_weights first"
        )
    for name, weight in weights.items():
        if any(isinstance(h.module, nn.RNNBase) for h in weight.holders):
            raise ValueError(
                f"{name} is a recurrent layer's, which takes its weights where scores do not reach"
            )


def first_scores(weights: Tensors, together: list[list[str]]) -> Tensors:
    """HYDRA's: the weights, at least in float32, times sqrt(6 / fan_in) / max |w|. One factor for
    all that are ranked ``together`` (the geometric mean of theirs), rounded to a power of two: no
    two weights change their order, nor become equal.
    """
    scores: Tensors = {}
    for group in together:
        sizes = [_log2_scale(weights[name]) for name in group]
        factor = 2.0 ** round(sum(sizes) / len(sizes))
        for name in group:
            w = weights[name]
            scores[name] = w.to(torch.promote_types(w.dtype, torch.float32)) * factor
    return scores


def _log2_scale(weight: Tensor) -> float:
    fan_in, most = weight[0].numel(), weight.abs().max().item()
    return 0.5 * math.log2(6 / fan_in) - math.log2(most) if most else 0.0


def learned_scores(
    model: nn.Module,
    weights: Mapping[str, Weight],
    scores: Tensors,
    choose: Callable[[Tensors], Tensors],
    train: Callable[[nn.Module], Any],
) -> Tensors:
    """What ``train`` makes of the scores, which ``model`` has only meanwhile. Those of ``weights``
    that have none (the vectors of channels) go with the choice of others.

    Raises:
        ValueError: ``train`` changed scores without a forward of the whole model, before which
            they choose.
    """
    scored = score_weights(model, {n: w.holders for n, w in weights.items()}, scores, choose)
    try:
        train(model)
        learned = scored.values()
    finally:
        scored.remove()
    if not scored.chose and any(not scores[n].equal(t.to(scores[n])) for n, t in learned.items()):
        raise ValueError(
            f"train has to call the {type(model).__name__} itself, not its parts: before its "
            "forward the scores choose"
        )
    return learned
