"""The tickets themselves: their size, how much they have in common, how sparse each layer is."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from ..methods.tickets import Ticket, TicketConfig, draw_ticket
from ..report import Table
from .experiments import Setup, encoder
from .plan import ITERATIVE
from .results import Results


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of the tickets at the transfer sparsity, by name.

    Attributes:
        tickets: one-shot and iterative ones.
        file_bytes: of those that have a file.
        weight_bytes: of the weights that they are about, in float32.
    """

    tickets: dict[str, Ticket]
    file_bytes: dict[str, int]
    weight_bytes: int

    @classmethod
    def of(cls, setup: Setup, results: Results) -> Facts:
        """Read them from their files, and draw the one-shot ticket."""
        sparsity = results.plan.transfer
        tickets, sizes = {}, {}
        for name, (scheme, source) in results.tickets().items():
            if scheme == ITERATIVE:
                path = setup.ticket(source, sparsity)
                tickets[name], sizes[name] = Ticket.load(path), path.stat().st_size
            else:
                model = encoder(setup.model).build("classifier", 2, 0).model
                tickets[name] = draw_ticket(model, TicketConfig(sparsity=sparsity / 100))
        weights = sum(layer.size for layer in next(iter(tickets.values())).layers)
        return cls(tickets, sizes, 4 * weights)

    def overlaps(self) -> dict[str, dict[str, float]]:
        """Survivors of both tickets relative to those of either, in [0, 1]."""
        found: dict[str, dict[str, float]] = {name: {} for name in self.tickets}
        for a, b in itertools.product(self.tickets, repeat=2):
            found[a][b] = found[b].get(a) or self.tickets[a].overlap(self.tickets[b])
        return found

    def overlap_table(self) -> Table:
        """:meth:`overlaps` in %."""
        rows = tuple(
            (name, *(f"{100 * value:.1f}" for value in row.values()))
            for name, row in self.overlaps().items()
        )
        return Table(("survivors in common, %", *self.tickets), rows)

    def layer_table(self) -> Table:
        """The sparsity of every weight, in %."""
        columns = [{la.name: la.sparsity for la in t.layers} for t in self.tickets.values()]
        rows = tuple(
            (name, *(f"{100 * column[name]:.1f}" for column in columns)) for name in columns[0]
        )
        return Table(("sparsity of each weight, %", *self.tickets), rows)

    def size(self) -> str:
        """What a file of a ticket takes, in a sentence."""
        largest = max(self.file_bytes.values())
        return (
            f"A ticket's file has {largest:,} bytes, {largest / self.weight_bytes:.1%} of the "
            f"{self.weight_bytes:,} of the weights that it is about in float32."
        )

    def figures(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "file_bytes": self.file_bytes,
            "weight_bytes": self.weight_bytes,
            "sparsities": {name: ticket.sparsity for name, ticket in self.tickets.items()},
            "layers": {
                name: {layer.name: layer.sparsity for layer in ticket.layers}
                for name, ticket in self.tickets.items()
            },
            "overlaps": self.overlaps(),
        }
