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
ROUNDING = 1e-9
METRICS = {"accuracy": "standard accuracy", "robust": "robust accuracy"}
"""What a double win is about: fields of a run, and what they are called."""


@dataclasses.dataclass(frozen=True)
class Win:
    """Where the tickets of one drawing are as good as the whole network.

    Attributes:
        level: the highest at which a ticket is, in all of ``margins``; 0 if none is.
        open: the highest of which that cannot be told, since runs are missing, or the whole
            network's diverged; 0 if there is none. A ticket one of whose runs diverged is not.
        margins: level -> (regime, metric) -> mean score less that of the whole network, as a
            fraction; None where a run is missing or diverged.
    """

    level: int
    open: int
    margins: dict[int, dict[tuple[str, str], float | None]]

    def __str__(self) -> str:
        if self.open <= self.level:
            return _sparsity(self.level)
        return f"at least {_sparsity(self.level)}" if self.level else MISSING


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

    @property
    def within(self) -> str:
        """The tolerance, in words."""
        points = 100 * self.tolerance
        return f"{points:g} point{'s' * (points != 1)}"

    def values(self, metric: str, place: Cell) -> tuple[float, ...]:
        """A field of the runs at a place, one a seed, whatever that of ``place``; none where one
        diverged, or has no such figure."""
        found = [getattr(run, metric) for run in self._found(place)]
        whole = len(found) == self.plan.seeds and None not in found
        return tuple(found) if whole else ()

    def _found(self, place: Cell) -> list[Run]:
        """The finished runs at a place, of any seed."""
        cells = [dataclasses.replace(place, seed=seed) for seed in range(self.plan.seeds)]
        return [self._runs[cell] for cell in cells if cell in self._runs]

    def mean(self, metric: str, place: Cell) -> float | None:
        """That of :meth:`values`; None where there are none."""
        found = self.values(metric, place)
        return statistics.fmean(found) if found else None

    @property
    def double(self) -> bool:
        """Whether there is what a double win is about: tickets, and both regimes."""
        return bool(self.plan.drawings) and {STANDARD, ADVERSARIAL} <= {*self.plan.regimes}

    def win(self, pretraining: str, drawing: str, percent: float) -> Win:
        """Where tickets match in standard and robust accuracy under every regime."""
        margins: dict[int, dict[tuple[str, str], float | None]] = {}
        won, unknown = [0], [0]
        for level in self.plan.levels:
            margins[level] = {}
            lost = False
            for regime, metric in itertools.product(self.plan.regimes, METRICS):
                place = Cell(pretraining, drawing, level, regime, percent, 0)
                mean = self.mean(metric, place)
                dense = self.mean(metric, dataclasses.replace(place, drawing=DENSE, level=0))
                less = None if mean is None or dense is None else mean - dense
                margins[level][regime, metric] = less
                lost |= any(run.error is not None for run in self._found(place))
                lost |= less is not None and less < -self.tolerance - ROUNDING
            if not lost:
                (unknown if None in margins[level].values() else won).append(level)
        return Win(max(won), max(unknown), margins)

    def wins(self) -> Table:
        """The highest sparsity that matches, of every pre-training and drawing, a column a part of
        the data."""
        rows = []
        for pretraining, drawing in itertools.product(self.plan.pretrainings, self.plan.drawings):
            found = [str(self.win(pretraining, drawing, p)) for p in self.plan.percents]
            rows.append((f"{pretraining}: {drawing}", *found))
        return Table(
            ("tickets of", *(f"{p:g} % of the data" for p in self.plan.percents)), tuple(rows)
        )

    def best(self) -> dict[str, tuple[Win, str]]:
        """Of every pre-training the highest double win with the most data, and the drawing that
        reaches it; nothing where the plan has no double wins."""
        found = {}
        for pretraining in self.plan.pretrainings if self.double else ():
            wins = {
                d: self.win(pretraining, d, max(self.plan.percents)) for d in self.plan.drawings
            }
            drawing = max(wins, key=lambda name: wins[name].level)
            unknown = max(win.open for win in wins.values())
            found[pretraining] = (dataclasses.replace(wins[drawing], open=unknown), drawing)
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
        return DIVERGED if any(run.error is not None for run in self._found(place)) else MISSING

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
        most = f"with {max(self.plan.percents):g} % of the data"
        said = f"all four accuracies within {self.within} of the whole network's"
        for pretraining, (win, drawing) in self.best().items():
            found = "no ticket is a double win"
            if win.level:
                found = f"the highest double-win sparsity is {_sparsity(win.level)} ({drawing})"
            if win.open > win.level:
                found += f" so far, up to {_sparsity(win.open)} is open"
            lines.append(f"{pretraining}, {most}: {found}; a double win is {said}.")
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
                    "level": win.level, "sparsity": sparsity(win.level), "open": win.open,
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
