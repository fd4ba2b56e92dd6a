"""Means over datasets, each named for what it is the mean of."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from ..report import Table, mean_std
from ..tasks.vtab import DATASETS, GROUPS
from .protocol import Outcome

MISSING, DIVERGED = "missing", "diverged"


@dataclasses.dataclass(frozen=True)
class Mean:
    """What it is the mean of, and its value by method: None where an accuracy of it is missing."""

    label: str
    values: dict[str, float | None]


class Summary:
    """Every method on every dataset.

    Attributes:
        methods: their names, in order.
        datasets: names; all nineteen, run or not, as soon as one of them was run, then others.
        overall: the mean over the nineteen, or over what was run where one of them was not.
    """

    def __init__(self, outcomes: Sequence[Outcome]):
        self.outcomes = {(o.dataset, o.method): o for o in outcomes}
        self.methods = [*dict.fromkeys(o.method for o in outcomes)]
        self._run = [*dict.fromkeys(o.dataset for o in outcomes)]
        official = [*DATASETS] if any(name in DATASETS for name in self._run) else []
        self.datasets = official + [name for name in self._run if name not in DATASETS]
        whole = set(DATASETS) <= set(self._run)
        self._averaged = [*DATASETS] if whole else self._run
        count = len(self._averaged)
        label = f"{count} dataset{'s' if count > 1 else ''}{'' if whole else ' run'}"
        self.overall = self._over(f"mean of the {label}", self._averaged)

    def means(self) -> list[Mean]:
        """Of each group, of the three groups, and over all: never one under another's name."""
        found = []
        if any(name in DATASETS for name in self.datasets):
            whole = []
            for group in GROUPS:
                members = [name for name, (its, _) in DATASETS.items() if its == group]
                run = [name for name in members if name in self._run]
                some = "" if run == members else f"the {len(run)} run of "
                mean = self._over(f"{group}, mean of {some}{len(members)}", run)
                found.append(mean)
                whole.append(mean.values if run == members else {})
            by_method = {m: [values.get(m) for values in whole] for m in self.methods}
            found.append(
                Mean(
                    "mean of the three groups",
                    {m: _mean(values) for m, values in by_method.items()},
                )
            )
        return [*found, self.overall]

    def by_seed(self, method: str) -> tuple[float, ...]:
        """The mean that ``overall`` has, for each seed; none if one is missing."""
        rows = [self.outcomes[name, method].tested for name in self._averaged]
        return (
            tuple(statistics.fmean(column) for column in zip(*rows, strict=True))
            if all(rows)
            else ()
        )

    def table(self) -> Table:
        """Test accuracies in %: a row a dataset, then the means; a column a method."""
        rows = [
            (name, *(self._cell(name, method) for method in self.methods)) for name in self.datasets
        ]
        rows += [
            (mean.label, *(percent(mean.values[method]) for method in self.methods))
            for mean in self.means()
        ]
        return Table(("test accuracy %", *self.methods), tuple(rows))

    def chosen(self) -> Table:
        """What the searches chose, and its accuracy on the 200 validation images."""
        rows = []
        for name in self._run:
            cells = [name]
            for method in self.methods:
                outcome = self.outcomes[name, method]
                if outcome.chosen is None:
                    cells.append(DIVERGED)
                else:
                    rate, decay = outcome.chosen
                    cells.append(f"{rate:g}, {decay:g}: {percent(outcome.val_accuracy)}")
            rows.append(tuple(cells))
        return Table(("learning rate, weight decay: validation %", *self.methods), tuple(rows))

    def _cell(self, dataset: str, method: str) -> str:
        outcome = self.outcomes.get((dataset, method))
        if outcome is None:
            return MISSING
        return mean_std([100 * a for a in outcome.tested]) if outcome.tested else DIVERGED

    def _over(self, label: str, datasets: Sequence[str]) -> Mean:
        return Mean(
            label,
            {m: _mean([self.outcomes[name, m].mean for name in datasets]) for m in self.methods},
        )


def percent(value: float | None) -> str:
    """A fraction in per cent; without one, that it is missing."""
    return MISSING if value is None else f"{100 * value:.1f}"


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found and len(found) == len(values) else None
