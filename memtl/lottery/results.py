"""Scores by cell, and what follows from them: tables, verdicts, what transfers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ..report import Table, mean_std
from .plan import DENSE, ITERATIVE, MLM, ONE_SHOT, PERMUTED, RANDOM, SHUFFLED, Cell, Plan
from .verdict import Verdict, mean, sparsest

MISSING, DIVERGED = "-", "diverged"
UNIVERSAL = "universal (mlm)"


class Results:
    """The scores of a plan.

    Args:
        plan: what was run.
        scores: of every cell of it; None where the run diverged.
    """

    def __init__(self, plan: Plan, scores: Mapping[Cell, float | None]):
        self.plan = plan
        self._scores = scores

    def scores(self, task: str, scheme: str, source: str, sparsity: int) -> tuple[float, ...]:
        """One a seed; none where one diverged, or where there is no such cell."""
        cells = [Cell(task, scheme, source, sparsity, seed) for seed in range(self.plan.seeds)]
        found = [score for cell in cells if (score := self._scores.get(cell)) is not None]
        return tuple(found) if len(found) == len(cells) else ()

    def dense(self, task: str) -> tuple[float, ...]:
        """The scores of the whole encoder."""
        return self.scores(task, DENSE, "", 0)

    def schemes(self, task: str) -> dict[str, tuple[str, str]]:
        """The rows of a task's tables: name -> scheme and source."""
        found = {"iterative": (ITERATIVE, task), "one-shot": (ONE_SHOT, "")}
        if self.plan.universal:
            found[UNIVERSAL] = (ITERATIVE, MLM)
        if self.plan.controls:
            found |= {"shuffled": (SHUFFLED, task), "random": (RANDOM, "")}
        if self.plan.permuted:
            found["permuted weights"] = (PERMUTED, task)
        return found

    def verdicts(self, task: str, scheme: str, source: str) -> list[Verdict]:
        """A scheme at each of its sparsities."""
        return [
            Verdict(sparsity, self.scores(task, scheme, source, sparsity), self.dense(task))
            for sparsity in self.plan.sparsities
            if Cell(task, scheme, source, sparsity, 0) in self._scores
        ]

    def accuracies(self, task: str) -> Table:
        """Mean and deviation of the scores in %: a row a scheme, a column a sparsity."""
        columns = (0, *self.plan.sparsities)
        rows = [("dense", *(self._cell(task, DENSE, "", s) for s in columns))]
        rows += [
            (name, *(self._cell(task, *scheme, s) for s in columns))
            for name, scheme in self.schemes(task).items()
        ]
        return Table((task, *(f"{s} %" for s in columns)), tuple(rows))

    def _cell(self, task: str, scheme: str, source: str, sparsity: int) -> str:
        if Cell(task, scheme, source, sparsity, 0) not in self._scores:
            return MISSING
        found = self.scores(task, scheme, source, sparsity)
        return mean_std([100 * score for score in found]) if found else DIVERGED

    def matching(self) -> Table:
        """Of every task and scheme, where tickets match the dense runs, and the numbers."""
        rows = []
        for task in self.plan.tasks:
            for name, scheme in self.schemes(task).items():
                verdicts = self.verdicts(task, *scheme)
                best = sparsest(verdicts)
                at = " ".join(str(v.sparsity) for v in verdicts if v.matching)
                bound = verdicts[0].bound if verdicts else None
                rows.append(
                    (
                        f"{task}: {name}",
                        self._cell(task, DENSE, "", 0),
                        MISSING if bound is None else f"{100 * bound:.1f}",
                        at or ("none" if bound is not None else "not decided"),
                        MISSING if best is None else f"{best.sparsity} %",
                        MISSING if best is None else mean_std([100 * s for s in best.ticket]),
                    )
                )
        header = (
            "ticket", "dense", "bound", "matching at %", "sparsest matching", "its score",
        )  # fmt: skip
        return Table(header, tuple(rows))

    def tickets(self) -> dict[str, tuple[str, str]]:
        """The tickets that are tried on every task: name -> scheme and source."""
        found = {source: (ITERATIVE, source) for source in self.plan.tasks}
        if self.plan.universal:
            found[UNIVERSAL] = (ITERATIVE, MLM)
        return found | {"one-shot": (ONE_SHOT, "")}

    def transfer(self) -> dict[str, dict[str, float | None]]:
        """Ticket -> task -> mean score less that of the dense runs, at the transfer sparsity."""

        def less(task: str, scheme: str, source: str) -> float | None:
            found = self.scores(task, scheme, source, self.plan.transfer)
            dense = self.dense(task)
            return statistics.fmean(found) - statistics.fmean(dense) if found and dense else None

        return {
            name: {task: less(task, *scheme) for task in self.plan.tasks}
            for name, scheme in self.tickets().items()
        }

    def elsewhere(self) -> dict[str, float | None]:
        """The mean of each row of :meth:`transfer` over other tasks than the ticket's own."""
        return {
            name: mean([value for task, value in row.items() if task != name])
            for name, row in self.transfer().items()
        }

    def transfer_table(self) -> Table:
        """:meth:`transfer` and :meth:`elsewhere` in points."""
        others = self.elsewhere()
        rows = tuple(
            (name, *(points(value) for value in row.values()), points(others[name]))
            for name, row in self.transfer().items()
        )
        return Table(("ticket of", *self.plan.tasks, "mean of other tasks"), rows)

    def universal(self) -> list[str]:
        """What is to be said of the universal ticket against others, a sentence each: both are
        means over the same tasks, which a task's own ticket was not drawn on."""
        if not self.plan.universal:
            return []
        matrix, tasks = self.transfer(), self.plan.tasks
        universal, others = matrix[UNIVERSAL], self.elsewhere()
        overall = mean([*universal.values()])
        lines = [_compared("Over all tasks", overall, others["one-shot"], "the one-shot one")]
        if len(tasks) == 1:
            return lines
        own = mean([others[name] for name in tasks])
        lines.append(_compared("Over all tasks", overall, own, "the mean of other tasks'"))
        for name in tasks:
            there = mean([value for task, value in universal.items() if task != name])
            lines.append(_compared(f"On tasks but {name}", there, others[name], f"that of {name}"))
        for task in tasks:
            rest = mean([matrix[name][task] for name in tasks if name != task])
            lines.append(_compared(f"On {task}", universal[task], rest, "the mean of other tasks'"))
        return lines

    def figures(self) -> dict[str, Any]:
        """Everything, ready for JSON; scores are fractions."""
        return {
            "scores": [
                {
                    "task": cell.task, "scheme": cell.scheme, "source": cell.source,
                    "sparsity": cell.sparsity, "seed": cell.seed, "score": score,
                }
                for cell, score in self._scores.items()
            ],
            "verdicts": [
                {
                    "task": task, "scheme": name, "sparsity": v.sparsity,
                    "dense_mean": mean(v.dense),
                    "dense_std": statistics.stdev(v.dense) if v.decided else None,
                    "bound": v.bound, "mean": v.mean, "matching": v.matching,
                }
                for task in self.plan.tasks
                for name, scheme in self.schemes(task).items()
                for v in self.verdicts(task, *scheme)
            ],
            "sparsest_matching": {
                task: {
                    name: getattr(sparsest(self.verdicts(task, *scheme)), "sparsity", None)
                    for name, scheme in self.schemes(task).items()
                }
                for task in self.plan.tasks
            },
            "transfer": self.transfer(),
            "transfer_means": self.elsewhere(),
        }  # fmt: skip

    def diverged(self) -> Iterable[Cell]:
        """Cells whose run did."""
        return (cell for cell, score in self._scores.items() if score is None)


def points(value: float | None) -> str:
    """A difference of scores in points of a hundred, with its sign."""
    return MISSING if value is None else f"{100 * value:+.1f}"


def _compared(where: str, value: float | None, other: float | None, whose: str) -> str:
    if value is None or other is None:
        return f"{where}, the universal ticket and {whose}: not decided, a score is missing."
    verdict = "above" if value > other else "not above"
    return (
        f"{where}, the universal ticket ({points(value)}) is {verdict} {whose} ({points(other)})."
    )
