"""What there is to do, one thing a call: draw the tickets of a source, or fine-tune under one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from torch import nn

from ..methods.tickets import Ticket, TicketConfig, draw_ticket, permute_layers
from ..training import fit, score
from .experiments import Key, Run, Setup, encoder, load
from .plan import DENSE, ONE_SHOT, PERMUTED, RANDOM, SHUFFLED


def draw(setup: Setup, source: str, progress: bool | None = False) -> None:
    """Draw the tickets of a source, a file a round; goes on behind the last round that is there.

    Args:
        progress: show a bar over the rounds; None: in a terminal.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    task = load(source, setup.model)
    recipe = setup.recipe(source)
    wrapped = encoder(setup.model).build(task.head, task.num_classes, recipe.drawing_seed)
    wrapped.to(setup.device)
    settings = recipe.settings(recipe.drawing_seed)

    def train(model: nn.Module, number: int, on_step: Callable[[int], None]) -> None:
        fit(
            wrapped, task.train, None, settings, on_step=on_step, progress=False,
            description=f"{source}, round {number}",
        )  # fmt: skip

    folder = setup.folder(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draw_ticket(
        wrapped.model, setup.rounds(), train=train, directory=folder, task=source,
        progress=progress,
    )  # fmt: skip


def run(setup: Setup, key: Key) -> Run:
    """Fine-tune once, and score the weights of the last step; a loss that is not finite ends it.

    Raises:
        FileNotFoundError: the ticket that ``key`` asks for is not drawn.
    """
    task = load(key.task, setup.model)  # once in a process, and no part of a run's time
    started = time.perf_counter()
    model = encoder(setup.model).build(task.head, task.num_classes, key.seed).to(setup.device)
    recipe = dataclasses.replace(setup.recipe(key.task), learning_rate=key.learning_rate)
    if key.scheme == PERMUTED:
        permute_layers(model.model, key.seed)
    if key.scheme != DENSE:
        ticket(setup, key, model.model).apply(model.model)
    found, failure = None, None
    try:
        fit(model, task.train, None, recipe.settings(key.seed), progress=False)
        found = score(model, task, getattr(task, key.split))
    except FloatingPointError as error:
        failure = str(error)
    return Run(key, found, failure, time.perf_counter() - started)


def ticket(setup: Setup, key: Key, model: nn.Module) -> Ticket:
    """The ticket of a run, for its model."""
    sparsity = key.sparsity / 100
    if key.scheme == ONE_SHOT:
        return draw_ticket(model, TicketConfig(sparsity=sparsity))
    if key.scheme == RANDOM:
        return draw_ticket(model, TicketConfig(scheme="random", sparsity=sparsity, seed=key.seed))
    drawn = Ticket.load(setup.ticket(key.source, key.sparsity))
    return drawn.shuffled(key.seed) if key.scheme == SHUFFLED else drawn
