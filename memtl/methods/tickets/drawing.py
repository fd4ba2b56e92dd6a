"""Drawing tickets: by magnitude, at once or in rounds, by scores that are learned, at random.

Chen, Frankle, Chang, Liu, Zhang, Wang and Carbin: The Lottery Ticket Hypothesis for Pre-trained
BERT Networks, NeurIPS 2020.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.masked import is_masked
from ...training import track
from .channels import channel_vectors, surviving_entries, with_vectors
from .choosing import Masks, choose_masks, draw_masks, ranked_together
from .config import TicketConfig
from .learned import check_scorable, first_scores, learned_scores
from .masks import digest
from .patterns import UNSTRUCTURED, Layout, check_fit
from .run import Run
from .scope import (
    check_unmasked,
    head_tensors,
    inner_model,
    named_weights,
    weights_in_scope,
)
from .snapshot import Snapshot, put_state, state_of
from .ticket import Source, Ticket

Train = Callable[[nn.Module, int, Callable[[int], None]], Any]

TRAINED = ("iterative", "learned")
"""The schemes that train."""


def draw_ticket(
    model: nn.Module,
    config: TicketConfig,
    *,
    train: Train | None = None,
    directory: str | os.PathLike[str] | None = None,
    task: str = "",
    progress: bool | None = None,
) -> Ticket:
    """Find out which weights of ``model`` survive. The model is left as it was.

    With the scheme "iterative" a round is: ``train`` trains the model, the smallest of the weights
    that are left are pruned, and all weights go back to where they started, or to what they were
    after ``config.rewind_step`` steps; the next round trains the weights that are left.

    With the scheme "learned" the weights stay as they are, and what ``train`` trains is a score of
    each, which is a parameter of ``model`` as long as it runs: before every forward of ``model``
    the largest scores choose the weights that are used, and gradients go straight through that
    choice, to the scores of pruned weights too. (With the pattern "channel" the biases and norms of
    pruned channels are pruned meanwhile too.) Scores are ranked by magnitude, as HYDRA's, and
    begin as the weights, scaled by layer (by one factor if the level is "global"): untrained they
    draw the ticket of "magnitude". Beside them trains what trains of the head. The rest of the
    model is frozen, the affine parameters of norms too; running statistics follow the batches
    wherever ``train`` has norms in training mode, and are given back with everything else.

    Args:
        model: any module to which no ticket is applied.
        config: which weights, how many.
        train: of an iterative or learned draw: ``train(model, round, on_step)`` trains ``model`` in
            place, what of it requires a gradient, with an optimizer and a schedule of its own, in
            the rounds 1, 2, ... (a learned draw has one); if ``config.rewind_step`` is not 0, an
            iterative one has to call ``on_step(steps)`` after every step, with the number of steps
            done in this round. What it does should depend on the model and the round alone.
        directory: of an iterative or learned draw: where the ticket of every round is kept,
            ``round-01.safetensors`` and so on, with what a later call needs to go on behind the
            last round that is complete. An interrupted draw then gives the ticket that it would
            have given.
        task: what the ticket says it was drawn for.
        progress: show a bar over the rounds; None: in a terminal.

    Returns:
        The ticket; its masks are on the CPU.

    Raises:
        TypeError: ``model``, ``config`` or ``train`` is no such thing.
        ValueError: nothing is in scope; a weight, which is named, is not finite, on the meta device
            or made in inference mode, or cannot have ``config.pattern``; a layer would keep no
            weight at all; ``model`` has a ticket; ``train`` did not reach ``rewind_step``, or added
            or took away parameters; ``train`` or ``directory`` with a scheme that does not train;
            or what is in ``directory`` was drawn with another configuration or from another start,
            or another draw is at work there. Of a learned draw also: a weight is in 8 bits or a
            recurrent layer's; or ``train`` changed frozen parameters, or never called ``model``
            itself.

    Memory: at work the masks, and, of an iterative draw, a copy of the model or two, of a learned
    one such a copy and twice the scores, four bytes a weight (of float64 eight), of a random one
    four bytes a weight; with a pattern a copy or two of one weight, and four bytes for every group
    of weights.
    """
    if not isinstance(config, TicketConfig):
        raise TypeError(f"config must be a memtl.TicketConfig, got {config!r}")
    model = inner_model(model)
    weights, transposed = _weights(model, config), _transposed(model, config)
    check_unmasked(model)
    _check_finite(weights, "")
    source = Source(type(model).__name__, digest(weights), task, config.scheme)
    if config.scheme in TRAINED:
        if not callable(train):
            article = "an" if config.scheme == "iterative" else "a"
            raise TypeError(
                f"{article} {config.scheme} draw needs train, a function, got {train!r}"
            )
        if config.scheme == "learned":
            check_scorable(model, weights_in_scope(model, config.scope))
        with contextlib.nullcontext() if directory is None else Run(directory) as run:
            return _trained(model, config, transposed, source, train, run, progress)
    if train is not None or directory is not None:
        raise ValueError(f"train and directory are of the schemes {TRAINED}, not {config.scheme!r}")
    masks = draw_masks(weights, config, transposed, config.sparsity)
    return _ticket(model, weights, masks, config, transposed, source)


def _weights(model: nn.Module, config: TicketConfig) -> dict[str, Tensor]:
    scope = weights_in_scope(model, config.scope)
    for name, weight in scope.items():
        if weight.obstacle:
            raise ValueError(f"{name} {weight.obstacle}")
    return {name: weight.parameter.detach() for name, weight in scope.items()}


def _transposed(model: nn.Module, config: TicketConfig) -> dict[str, int]:
    """:attr:`Ticket.transposed`, after a check that every weight can have the pattern."""
    if config.pattern == UNSTRUCTURED:
        return {}
    scope = weights_in_scope(model, config.scope)
    found = {name: weight.transposed for name, weight in scope.items()}
    if wrong := [name for name, groups in found.items() if groups is None]:
        raise ValueError(
            f"the pattern {config.pattern!r} is of linear layers and convolutions, but others read "
            f"{', '.join(wrong)}, or two read it differently: scope can leave weights out"
        )
    transposed = {name: groups for name, groups in found.items() if groups}
    shapes = {name: weight.parameter.shape for name, weight in scope.items()}
    check_fit(config.pattern, {n: Layout.of(s, transposed.get(n, 0)) for n, s in shapes.items()})
    return transposed


def _check_finite(weights: dict[str, Tensor], when: str) -> None:
    for name, weight in weights.items():
        if not torch.stack(weight.aminmax()).isfinite().all():  # with a NaN, both are
            raise ValueError(f"{name} holds a value that is not finite{when}")


def _ticket(
    model: nn.Module,
    weights: dict[str, Tensor],
    masks: Masks,
    config: TicketConfig,
    transposed: dict[str, int],
    source: Source,
) -> Ticket:
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    ticket = Ticket(masks, shapes, config, source, transposed=transposed)
    return with_vectors(ticket, model) if config.pattern == "channel" else ticket


def _trained(
    model: nn.Module,
    config: TicketConfig,
    transposed: dict[str, int],
    source: Source,
    train: Train,
    run: Run | None,
    progress: bool | None,
) -> Ticket:
    """A draw that trains; ``model`` is given back as it was, whatever happens."""
    before = Snapshot.of(model)
    try:
        if config.scheme == "learned":
            return _learned(model, config, transposed, source, train, run, before)
        return _rounds(model, config, transposed, source, train, run, before, progress)
    finally:
        if is_masked(model):
            Ticket.of(model).remove(model)
        before.put(model)


def _rounds(
    model: nn.Module,
    config: TicketConfig,
    transposed: dict[str, int],
    source: Source,
    train: Train,
    run: Run | None,
    before: Snapshot,
    progress: bool | None,
) -> Ticket:
    """Train, prune, rewind."""
    head_names = head_tensors(model)
    origin = before.state  # copies, which no training changes: what every round goes back to
    ticket: Ticket | None = None
    head: dict[str, Tensor] = {}
    done = 0
    if run is not None:
        origin = run.begin(config, origin, head_names)
        done, ticket, origin, head = run.resume(config, origin, head_names)
    sparsities = config.rounds()
    left = range(done + 1, len(sparsities) + 1)
    for round in track(left, "rounds of the ticket", progress=progress):
        put_state(model, origin | head)
        before.put_mode(model)
        if ticket is not None:
            ticket.apply(model)
        steps = _Steps(model, config.rewind_step if round == 1 else 0)
        train(model, round, steps)
        before.check_names(model)
        origin = steps.origin(origin)
        weights = _weights(model, config)
        _check_finite(weights, f" after round {round}")
        given = None
        if ticket is not None:
            ticket.remove(model)
            given = ticket.masks
        masks = draw_masks(weights, config, transposed, sparsities[round - 1], given)
        after = dataclasses.replace(source, round=round)
        ticket = _ticket(model, weights, masks, config, transposed, after)
        if config.head == "kept":
            head = {name: t for name, t in state_of(model).items() if name in head_names}
        if run is not None:
            run.keep(round, ticket, origin if config.rewind_step else None, head)
    assert ticket is not None
    return ticket


def _learned(
    model: nn.Module,
    config: TicketConfig,
    transposed: dict[str, int],
    source: Source,
    train: Train,
    run: Run | None,
    before: Snapshot,
) -> Ticket:
    """Train scores and the head, and let the scores choose."""
    head = head_tensors(model)
    start = before.state
    if run is not None:
        start = run.begin(config, start, head)
        _, ticket = run.last(config)
        if ticket is not None:
            return ticket
        put_state(model, start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head and parameter.requires_grad)
    weights, scope = _weights(model, config), weights_in_scope(model, config.scope)
    layouts = {n: Layout.of(w.shape, transposed.get(n, 0)) for n, w in weights.items()}
    vectors = channel_vectors(model) if config.pattern == "channel" else {}
    named = named_weights(model)
    followers = {v: named[v] for name in scope for v in vectors.get(name, ())}

    def choose(scores: dict[str, Tensor]) -> Masks:
        masks = choose_masks(scores, config, transposed, config.sparsity)
        kept = surviving_entries(vectors, masks, layouts)
        return masks | {name: torch.ops.memtl.bits_pack(entries) for name, entries in kept.items()}

    scores = learned_scores(
        model,
        scope | followers,
        first_scores(weights, ranked_together(weights, config)),
        choose,
        lambda scored: train(scored, 1, lambda step: None),
    )
    before.check_names(model)
    before.check_same(model, head)
    _check_finite(scores, " among its scores after training")
    masks = draw_masks(scores, config, transposed, config.sparsity)
    ticket = _ticket(model, weights, masks, config, transposed, source)
    if run is not None:
        run.keep(1, ticket, None, {})
    return ticket


class _Steps:
    """``on_step`` of one round: copies the model after the step that is gone back to, if any."""

    def __init__(self, model: nn.Module, wanted: int):
        self.model = model
        self.wanted = wanted
        self.reached = 0
        self.taken: dict[str, Tensor] | None = None

    def __call__(self, step: int) -> None:
        self.reached = step
        if self.wanted and step == self.wanted:
            self.taken = state_of(self.model)

    def origin(self, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is gone back to from now on."""
        if not self.wanted:
            return before
        if self.taken is None:
            raise ValueError(
                f"rewind_step is {self.wanted}, but train called on_step last with {self.reached}"
            )
        return self.taken
