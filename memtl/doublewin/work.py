"""What there is to do, one thing a call: draw tickets, or transfer under one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from torch import nn

from ..methods.tickets import Ticket, TicketConfig, draw_ticket
from ..models import Normalized
from ..tasks import Split
from ..training import fit
from ..training.quality import quality
from ..training.robust import autoattack, robust_accuracy
from . import domain as domains
from .experiments import DRAWING_SEED, Key, Run, Setup
from .plan import DENSE, DRAWINGS, SOURCE, Draw, sparsity


def draw(setup: Setup, what: Draw, progress: bool | None = False) -> None:
    """Draw the tickets of all levels, or that of one; goes on behind the last round that is there.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    drawing = DRAWINGS[what.drawing]
    if drawing.data == SOURCE:
        whole = setup.domain.source_network(what.pretraining)
    else:
        whole = setup.domain.build(what.pretraining, DRAWING_SEED)
    whole.to(setup.device)
    settings, data = setup.round_settings(what), setup.drawing_data(what)

    def train(model: nn.Module, number: int, on_step: Callable[[int], None]) -> None:
        fit(
            whole, data, None, settings, objective=setup.recipe.objective(drawing.objective),
            on_step=on_step, progress=False,
        )  # fmt: skip

    folder = setup.folder(what)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draw_ticket(
        whole.model, setup.config(what), train=train, directory=folder, task=setup.domain.data,
        progress=progress,
    )  # fmt: skip


def run(setup: Setup, key: Key, what: Draw | None) -> Run:
    """Transfer once, and measure the weights of the last step; a loss that is not finite ends it.

    Raises:
        FileNotFoundError: the ticket that ``key`` asks for is not drawn.
    """
    data, domain = domains.task(setup.domain), setup.domain
    train = domains.part(domain, key.percent)
    outside = domains.outside(domain)
    started = time.perf_counter()
    model = domain.build(key.pretraining, key.seed).to(setup.device)
    if key.drawing != DENSE:
        ticket(setup, key, what, model).apply(model.model, sparse=False)
    settings = setup.settings(key.regime, key.percent, key.seed, key.learning_rate)
    try:
        fit(
            model, train, None, settings, objective=setup.recipe.objective(key.regime),
            progress=False,
        )  # fmt: skip
        found = _measured(setup, model, getattr(data, key.split), outside)
        error = None
    except FloatingPointError as failure:
        found, error = dict.fromkeys(FIGURES), str(failure)
    return Run(key, **found, error=error, seconds=time.perf_counter() - started)


FIGURES = ("accuracy", "robust", "nll", "ece", "auc_noise", "auc_letters", "autoattack")


def _measured(
    setup: Setup, model: Normalized, split: Split, outside: Mapping[str, Split]
) -> dict[str, float | None]:
    """:data:`FIGURES` of a model."""
    attack = setup.recipe.measured_by
    found = quality(model, split, outside)
    strongest = None
    if setup.recipe.autoattack:
        strongest = autoattack(model, split, attack.eps, attack.norm)
    figures = (
        found.accuracy, robust_accuracy(model, split, attack), found.nll, found.ece,
        found.ood_auc["noise"], found.ood_auc.get("letters"), strongest,
    )  # fmt: skip
    return dict(zip(FIGURES, figures, strict=True))


def ticket(setup: Setup, key: Key, what: Draw | None, model: Normalized) -> Ticket:
    """The ticket of a run, for its model."""
    if what is not None:
        return Ticket.load(setup.ticket(what, key.level))
    scheme = DRAWINGS[key.drawing].scheme
    config = TicketConfig(scheme=scheme, sparsity=sparsity(key.level), seed=key.seed)
    return draw_ticket(model.model, config)
