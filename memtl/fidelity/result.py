"""What measure() found, as tables and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..report import Table, ratio
from .recommend import KIB, Choice
from .rows import Row, Thresholds, plain

DEPTH_COLUMNS = ("low-bit 4", "low-bit 2", "fast 0.1", "small 0.1", "paper 0.1")
FIGURES = (
    "KiB/sample", "ratio", "bits", "weights", "worst", "error", "vectors", "worst", "error",
    "input", "short", "worst of all",
)  # fmt: skip
LEGEND = (
    "cosines of gradients with the exact ones, mean and worst, and mean relative errors: of "
    "weights,\nof vectors (biases, norms), of the first layer's input; short: parameters below {:g}"
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How close a model's gradients are to the exact ones, and at how many bytes. ``print`` it.

    Attributes:
        stock_bytes: what the model keeps for backward as it is, a sample.
        batch_size, seed: those of the measurement.
        parameters: of the model.
        negligible: parameters left out, whose exact gradient is below 2e-6 of the largest one's
            norm: rounding noise has no direction.
        absent: roles of which the model has no layer.
        thresholds: what the recommendation must meet.
        configurations: rows with everything converted.
        roles: rows with one role converted.
        choices: what is recommended: for each role, then (role "") for everything.
    """

    stock_bytes: float
    batch_size: int
    seed: int
    parameters: int
    negligible: tuple[str, ...]
    absent: tuple[str, ...]
    thresholds: Thresholds
    configurations: tuple[Row, ...]
    roles: tuple[Row, ...]
    choices: tuple[Choice, ...]

    @property
    def recommended(self) -> Row | None:
        """The configuration with the fewest bytes that meets the thresholds, if one does."""
        return next((choice.row for choice in self.choices if not choice.role), None)

    def by_configuration(self) -> Table:
        """Everything converted."""
        return _table(("configuration",), [((r.label,), r) for r in self.configurations], self)

    def by_role(self) -> Table:
        """One role converted, the others stock."""
        return _table(("role", "format"), [((r.role, r.label), r) for r in self.roles], self)

    def deep(self) -> tuple[Row, ...]:
        """The configurations whose depths are shown: five that differ, or the first five."""
        measured = [row for row in self.configurations if row.depths]
        known = [row for row in measured if row.label in DEPTH_COLUMNS]
        return tuple((known or measured)[: len(DEPTH_COLUMNS)])

    def by_depth(self) -> Table:
        """The cosine of the gradient that reaches each layer's input, from output to input."""
        rows = self.deep()
        layers = list(rows[0].depths) if rows else []
        return Table(
            ("input of layer", *(row.label for row in rows)),
            tuple((name, *(f"{row.depths[name]:.4f}" for row in rows)) for name in layers),
        )

    def notes(self) -> list[str]:
        """What was left out."""
        found = []
        if self.negligible:
            found.append(
                f"left out as rounding noise (norm below 2e-6 of the largest gradient's): "
                f"{len(self.negligible)} of the parameters, {', '.join(self.negligible[:3])}"
                + (", ..." if len(self.negligible) > 3 else "")
            )
        if self.absent:
            found.append(f"the model has no layer of the role {', '.join(self.absent)}")
        return found

    def errors(self) -> list[str]:
        """The rows that have no figures, each with the reason."""
        rows = (*self.configurations, *self.roles)
        return [f"{' '.join((r.role, r.label)).strip()}: {r.error}" for r in rows if r.error]

    def recommendation(self) -> str:
        """The rule, and every choice with its reason."""
        rule = f"thresholds: {self.thresholds}"
        return "\n".join([rule, *map(str, self.choices)])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return plain(self) | {"deep": [row.label for row in self.deep()]}

    def __str__(self) -> str:
        parts = [
            f"stock: {self.stock_bytes / KIB:,.1f} KiB a sample saved for backward",
            LEGEND.format(self.thresholds.worst),
            f"by configuration\n{self.by_configuration()}" if self.configurations else "",
            f"by role and format, the other roles stock\n{self.by_role()}" if self.roles else "",
            f"by depth, from output to input\n{self.by_depth()}" if self.deep() else "",
            "\n".join([*self.notes(), *self.errors()]),
            f"recommended\n{self.recommendation()}" if self.choices else "",
        ]
        return "\n\n".join(filter(None, parts))


def _table(
    titles: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], Row]], result: Result
) -> Table:
    return Table(
        (*titles, *FIGURES), tuple((*names, *_figures(row, result)) for names, row in rows)
    )


def _figures(row: Row, result: Result) -> tuple[str, ...]:
    if row.error:
        return (*["-"] * (len(FIGURES) - 1), f"error: {row.error.partition(':')[0]}")
    groups: list[str] = []
    for group in (row.weights, row.vectors):
        figures = (group.mean_cosine, group.worst_cosine, group.mean_error)
        groups += [f"{figure:.4f}" if group.compared else "-" for figure in figures]
    return (
        f"{row.bytes / KIB:,.1f}",
        ratio(row.bytes, result.stock_bytes),
        "-" if row.bits is None else f"{row.bits:.2f}",
        *groups,
        "-" if not row.depths or math.isnan(row.input_cosine) else f"{row.input_cosine:.4f}",
        str(len(result.thresholds.short(row))),
        row.worst.worst,
    )
