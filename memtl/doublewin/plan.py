"""What has to be run: cells, each of them one transfer of one network."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

DENSE = "dense"
STANDARD, ADVERSARIAL = "standard", "adversarial"
REGIMES = (STANDARD, ADVERSARIAL)
SOURCE, TARGET = "source", "target"
ROUND = 0.2
"""What a round prunes, of the weights that are left: a level of sparsity."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a ticket is drawn.

    Attributes:
        scheme: of :class:`memtl.TicketConfig`.
        objective: of the training in between, :data:`STANDARD` or :data:`ADVERSARIAL`; "" where
            there is none.
        data: what it trains on: :data:`SOURCE` or :data:`TARGET`, the part of it that the transfer
            has; "" where nothing is.
    """

    scheme: str
    objective: str = ""
    data: str = ""


DRAWINGS = {
    "one-shot": Drawing("magnitude"),
    "random": Drawing("random"),
    "iterative": Drawing("iterative", STANDARD, SOURCE),
    "iterative-adversarial": Drawing("iterative", ADVERSARIAL, SOURCE),
    "iterative-target": Drawing("iterative", STANDARD, TARGET),
    "iterative-target-adversarial": Drawing("iterative", ADVERSARIAL, TARGET),
    "learned": Drawing("learned", STANDARD, TARGET),
    "learned-adversarial": Drawing("learned", ADVERSARIAL, TARGET),
}
"""By name. Those on the source ask for its images."""


def sparsity(level: int) -> float:
    """What is pruned after so many rounds of a fifth of the weights that are left, in 0..1."""
    return 1 - (1 - ROUND) ** level


@dataclasses.dataclass(frozen=True)
class Cell:
    """A transfer to the target.

    Attributes:
        pretraining: which network it starts from.
        drawing: of the ticket, one of :data:`DRAWINGS`; :data:`DENSE`: there is none.
        level: of its sparsity (:func:`sparsity`); 0 of the dense network.
        regime: how it is trained, one of :data:`REGIMES`.
        percent: how much of the training data there is.
        seed: of the head, the order of the data, and random drawing.
    """

    pretraining: str
    drawing: str
    level: int
    regime: str
    percent: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Draw:
    """The drawing of tickets by training: of all levels up to ``level`` if it goes in rounds.

    Attributes:
        percent: of the target's training data, if it is drawn on that; else 0.
    """

    pretraining: str
    drawing: str
    level: int
    percent: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The grid.

    Args:
        pretrainings: names of networks.
        drawings: of :data:`DRAWINGS`.
        levels: of sparsity, rising.
        regimes: of :data:`REGIMES`.
        percents: of the training data.
        seeds: how many runs a cell of the tables is the mean of.

    Raises:
        ValueError: a value is none of these.
    """

    pretrainings: tuple[str, ...]
    drawings: tuple[str, ...] = ("one-shot", "iterative", "iterative-adversarial")
    levels: tuple[int, ...] = (4, 7, 10, 13)
    regimes: tuple[str, ...] = REGIMES
    percents: tuple[float, ...] = (100, 10, 1)
    seeds: int = 3

    def __post_init__(self) -> None:
        for name, known in (
            ("pretrainings", None),
            ("drawings", tuple(DRAWINGS)),
            ("levels", None),
            ("regimes", REGIMES),
            ("percents", None),
        ):
            values = getattr(self, name)
            if name != "drawings" and name != "levels" and not values:
                raise ValueError(f"{name} must be one or more, got none")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must be given once each, got {[*values]}")
            if known and (wrong := [value for value in values if value not in known]):
                raise ValueError(f"{name} are {', '.join(known)}, got {wrong[0]!r}")
        if bool(self.drawings) != bool(self.levels):
            raise ValueError("drawings have levels, and levels drawings: give both, or neither")
        if list(self.levels) != sorted(self.levels) or any(level < 1 for level in self.levels):
            raise ValueError(f"levels must be at least 1 and rise, got {[*self.levels]}")
        if wrong := [p for p in self.percents if not 0 < p <= 100]:
            raise ValueError(f"percents must be in (0, 100], got {wrong[0]}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    def cells(self) -> list[Cell]:
        """Every one once, the dense ones first."""
        return [*self.dense(), *self.tickets()]

    def dense(self) -> Iterable[Cell]:
        """The networks as they are."""
        for pretraining, regime, percent, seed in self._product(self.pretrainings):
            yield Cell(pretraining, DENSE, 0, regime, percent, seed)

    def tickets(self) -> Iterable[Cell]:
        """Every drawing at every level."""
        pairs = [*itertools.product(self.drawings, self.levels)]
        for drawing, level in pairs:
            for pretraining, regime, percent, seed in self._product(self.pretrainings):
                yield Cell(pretraining, drawing, level, regime, percent, seed)

    def draws(self) -> list[Draw]:
        """What is trained to draw tickets."""
        return [*dict.fromkeys(draw for cell in self.tickets() if (draw := self.draw(cell)))]

    def draw(self, cell: Cell) -> Draw | None:
        """How the ticket of a cell came about; None where nothing was trained for it."""
        drawing = DRAWINGS.get(cell.drawing)
        if drawing is None or not drawing.objective:
            return None
        level = max(self.levels) if drawing.scheme == "iterative" else cell.level
        percent = cell.percent if drawing.data == TARGET else 0
        return Draw(cell.pretraining, cell.drawing, level, percent)

    def _product(self, pretrainings: Sequence[str]) -> Iterable[tuple[str, str, float, int]]:
        return itertools.product(pretrainings, self.regimes, self.percents, range(self.seeds))
