"""Figures by cell, and what follows from them: tables, double wins, what robustness brings."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping
from typing import Any

from ..report import Table, mean_std
from .experiments import Run
from .plan import ADVERSARIAL, DENSE, STANDARD, Cell, Plan, sparsity

MISSING, DIVERGED = "-", "diverged"
METRICS = {"accuracy": "standard accuracy", "robust": "robust accuracy"}
"""What a double win is about: fields of a run, and what they are called."""


@dataclasses.dataclass(frozen=True)
class Win:
    """Where the tickets of one drawing are as good as the whole network.

    Attributes:
        level: the highest at which a ticket is in all of ``margins``; 0 if none is.
        margins: level -> (regime, metric) -> mean score less that of the whole network, as a
            fraction; None where a run diverged.
    """

    level: int
    margins: dict[int, dict[tuple[str, str], float | None]]


class Results:
    """The runs of a plan.

    Args:
        plan: what was run.
        runs: of its cells; where one of a place is missing there is no mean.
        tolerance: how much less than the whole network's a ticket's mean score may be, a fraction.
        reference: the pre-training that the others are compared with.

    Raises:
        ValueError: ``tolerance`` is negative, or there is no such ``reference``.
    """

    def __init__(
        self, plan: Plan, runs: Mapping[Cell, Run], tolerance: float = 0.01, reference: str = ""
    ):
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        reference = reference or plan.pretrainings[0]
        if reference not in plan.pretrainings:
            raise ValueError(
                f"reference must be one of {', '.join(plan.pretrainings)}, got {reference!r}"
            )
        self.plan = plan
        self.tolerance = tolerance
        self.reference = reference
        self._runs = runs

    def values(self, metric: str, place: Cell) -> tuple[float, ...]:
        """A field of the runs at a place, one a seed, whatever that of ``place``; none where one
        diverged, or has no such figure."""
        cells = [dataclasses.replace(place, seed=seed) for seed in range(self.plan.seeds)]
        found = [getattr(self._runs[cell], metric) for cell in cells if cell in self._runs]
        whole = len(found) == len(cells) and None not in found
        return tuple(found) if whole else ()

    def mean(self, metric: str, place: Cell) -> float | None:
        """That of :meth:`values`; None where there are none."""
        found = self.values(metric, place)
        return statistics.fmean(found) if found else None

    def win(self, pretraining: str, drawing: str, percent: float) -> Win:
        """Where tickets match in standard and robust accuracy under every regime."""
        margins: dict[int, dict[tuple[str, str], float | None]] = {}
        for level in self.plan.levels:
            margins[level] = {}
            for regime, metric in itertools.product(self.plan.regimes, METRICS):
                place = Cell(pretraining, drawing, level, regime, percent, 0)
                mean = self.mean(metric, place)
                dense = self.mean(metric, dataclasses.replace(place, drawing=DENSE, level=0))
                less = None if mean is None or dense is None else mean - dense
                margins[level][regime, metric] = less
        won = [
            level
            for level, found in margins.items()
            if all(margin is not None and margin >= -self.tolerance for margin in found.values())
        ]
        return Win(max(won, default=0), margins)

    def wins(self) -> Table:
        """The double-win sparsity of every pre-training and drawing, a column a part of the
        data."""
        rows = []
        for pretraining, drawing in itertools.product(self.plan.pretrainings, self.plan.drawings):
            found = [self.win(pretraining, drawing, p).level for p in self.plan.percents]
            rows.append((f"{pretraining}: {drawing}", *(_sparsity(level) for level in found)))
        return Table(
            ("tickets of", *(f"{p:g} % of the data" for p in self.plan.percents)), tuple(rows)
        )

    def best(self) -> dict[str, tuple[int, str]]:
        """Of every pre-training the highest double-win level with all of the data, and the drawing
        that reaches it."""
        found = {}
        for pretraining in self.plan.pretrainings:
            levels = {
                drawing: self.win(pretraining, drawing, max(self.plan.percents)).level
                for drawing in self.plan.drawings
            }
            drawing = max(levels, key=levels.__getitem__, default="")
            found[pretraining] = (levels.get(drawing, 0), drawing)
        return found

    def margins(self, percent: float) -> Table:
        """By how much every ticket is above or below its whole network, in points."""
        pairs = [*itertools.product(self.plan.regimes, METRICS)]
        rows = []
        for pretraining, drawing in itertools.product(self.plan.pretrainings, self.plan.drawings):
            win = self.win(pretraining, drawing, percent)
            for level, found in win.margins.items():
                texts = [points(found[pair]) for pair in pairs]
                rows.append((f"{pretraining}: {drawing}, {_sparsity(level)}", *texts))
        return Table(("ticket", *(f"{r}, {METRICS[m]}" for r, m in pairs)), tuple(rows))

    def table(self, metric: str, regime: str, percent: float) -> Table:
        """Mean and deviation by level; accuracies in %."""
        scale, digits = (100, 1) if metric in (*METRICS, "autoattack") else (1, 3)
        header = ("", "dense", *(_sparsity(level) for level in self.plan.levels))
        rows = []
        for pretraining, drawing in itertools.product(
            self.plan.pretrainings, self.plan.drawings or ("",)
        ):
            places = [(DENSE, 0), *((drawing, level) for level in self.plan.levels)]
            cells = [
                self._text(metric, scale, digits, Cell(pretraining, *place, regime, percent, 0))
                for place in places
            ]
            rows.append((f"{pretraining}: {drawing}" if drawing else pretraining, *cells))
        return Table(header, tuple(rows))

    def _text(self, metric: str, scale: float, digits: int, place: Cell) -> str:
        if found := self.values(metric, place):
            return mean_std([scale * value for value in found], digits)
        cells = [dataclasses.replace(place, seed=seed) for seed in range(self.plan.seeds)]
        runs = [self._runs[cell] for cell in cells if cell in self._runs]
        return DIVERGED if any(run.error for run in runs) else MISSING

    def gains(self, pretraining: str, drawing: str) -> dict[tuple[str, str, float], list[float]]:
        """Of tickets of one pre-training over those of the reference, at every level:
        (metric, regime, part of the data) -> differences of means."""
        found: dict[tuple[str, str, float], list[float]] = {}
        for metric, regime, percent, level in itertools.product(
            METRICS, self.plan.regimes, self.plan.percents, self.plan.levels
        ):
            place = Cell(pretraining, drawing, level, regime, percent, 0)
            mine = self.mean(metric, place)
            other = self.mean(metric, dataclasses.replace(place, pretraining=self.reference))
            if mine is not None and other is not None:
                found.setdefault((metric, regime, percent), []).append(mine - other)
        return found

    def transfer(self) -> Table:
        """:meth:`gains`, in points: means over levels."""
        columns = [*itertools.product(METRICS, self.plan.regimes, self.plan.percents)]
        rows = []
        for drawing, pretraining in itertools.product(self.plan.drawings, self._others()):
            gains = self.gains(pretraining, drawing)
            texts = [points(statistics.fmean(gains[c])) if c in gains else MISSING for c in columns]
            rows.append((f"{pretraining}: {drawing}", *texts))
        header = [f"{m}, {r}, {p:g} %" for m, r, p in columns]
        return Table((f"tickets over {self.reference}", *header), tuple(rows))

    def sentences(self) -> list[str]:
        """Whether tickets of the other pre-trainings transfer better, as found."""
        lines = []
        for drawing, pretraining in itertools.product(self.plan.drawings, self._others()):
            gains = self.gains(pretraining, drawing)
            for metric, regime in itertools.product(METRICS, self.plan.regimes):
                found = [
                    gain for p in self.plan.percents for gain in gains.get((metric, regime, p), ())
                ]
                if found:
                    above = sum(gain > 0 for gain in found)
                    lines.append(
                        f"{drawing} tickets of {pretraining} pre-training, {regime} transfer: "
                        f"{METRICS[metric]} above that of {self.reference} in {above} of "
                        f"{len(found)} places, {points(statistics.fmean(found))} points on average."
                    )
        return lines

    def _others(self) -> list[str]:
        return [name for name in self.plan.pretrainings if name != self.reference]

    def verdicts(self) -> list[str]:
        """The double wins, a sentence a pre-training."""
        lines = []
        said = f"within {100 * self.tolerance:g} points of the whole network's"
        missing = {STANDARD, ADVERSARIAL} - set(self.plan.regimes)
        for pretraining, (level, drawing) in self.best().items():
            if not self.plan.drawings or missing:
                continue
            what = f"double win up to a sparsity of {_sparsity(level)} ({drawing})"
            found = f"{what}, all four accuracies {said}" if level else f"no double win {said}"
            lines.append(f"{pretraining}: {found}.")
        return lines

    def figures(self) -> dict[str, Any]:
        """Everything, ready for JSON; accuracies are fractions."""
        fields = [f.name for f in dataclasses.fields(Run) if f.name not in ("key", "seconds")]
        return {
            "tolerance": self.tolerance,
            "reference": self.reference,
            "runs": [
                dataclasses.asdict(cell) | {name: getattr(run, name) for name in fields}
                for cell, run in self._runs.items()
            ],
            "double_win": [
                {
                    "pretraining": pretraining, "drawing": drawing, "percent": percent,
                    "level": win.level, "sparsity": sparsity(win.level),
                    "margins": {
                        str(level): {f"{r}, {m}": v for (r, m), v in found.items()}
                        for level, found in win.margins.items()
                    },
                }
                for pretraining, drawing, percent in itertools.product(
                    self.plan.pretrainings, self.plan.drawings, self.plan.percents
                )
                for win in [self.win(pretraining, drawing, percent)]
            ],
            "gains": [
                {
                    "pretraining": pretraining, "drawing": drawing, "metric": metric,
                    "regime": regime, "percent": percent, "differences": gains,
                }
                for drawing, pretraining in itertools.product(self.plan.drawings, self._others())
                for (metric, regime, percent), gains in self.gains(pretraining, drawing).items()
            ],
        }  # fmt: skip

    def has(self, metric: str) -> bool:
        """Whether any run has that figure."""
        return any(getattr(run, metric) is not None for run in self._runs.values())

    def diverged(self) -> list[Cell]:
        """Cells whose run did."""
        return [cell for cell, run in self._runs.items() if run.error is not None]


def points(value: float | None) -> str:
    """A difference of scores in points of a hundred, with its sign."""
    return MISSING if value is None else f"{100 * value:+.1f}"


def _sparsity(level: int) -> str:
    return f"{100 * sparsity(level):.1f} %" if level else "none"
