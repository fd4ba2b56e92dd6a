"""What has to be run: cells, each of them one fine-tuning."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

MLM = "mlm"
"""The source of the universal ticket: masked-language modelling."""

DENSE, ITERATIVE, ONE_SHOT = "dense", "iterative", "one-shot"
RANDOM, SHUFFLED, PERMUTED = "random", "shuffled", "permuted"
CONTROLS = (RANDOM, SHUFFLED)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A fine-tuning of the pre-trained encoder on ``task`` under a ticket.

    Attributes:
        scheme: of the ticket:

            - dense: none, the encoder is whole;
            - iterative: drawn in rounds on ``source``, a task or :data:`MLM`;
            - one-shot: the smallest of the pre-trained weights are pruned;
            - random: any are, drawn by ``seed``;
            - shuffled: that of ``source``, its mask shuffled in each tensor by ``seed``;
            - permuted: that of ``source``, on weights that have changed places with those of other
              layers, by ``seed``.
        source: what the ticket was drawn on; "" where nothing was trained for it.
        sparsity: weights that are pruned, of those a ticket is about, in per cent.
        seed: of the head, the order of the data, dropout, and what the scheme draws.
    """

    task: str
    scheme: str
    source: str
    sparsity: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The experiment. All sparsities are in per cent.

    Args:
        tasks: their names.
        seeds: how many runs a cell of the tables is the mean of.
        sparsities: of the iterative, one-shot and universal tickets: rounds, of 10 % each, lead to
            the largest, and pass the others.
        controls: at which of them there are random and shuffled tickets.
        transfer: at which every ticket is tried on every task.
        universal: whether there is a ticket by masked-language modelling.
        permuted: also try, at the last of ``controls``, the tickets on permuted weights.

    Raises:
        ValueError: a value is none of these.
    """

    tasks: tuple[str, ...]
    seeds: int = 3
    sparsities: tuple[int, ...] = (30, 40, 50, 60, 70)
    controls: tuple[int, ...] = (30, 50, 70)
    transfer: int = 70
    universal: bool = True
    permuted: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be one or more, each once, got {list(self.tasks)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        given = self.sparsities
        if not given or list(given) != sorted(set(given)) or not 0 < given[0] <= given[-1] < 100:
            raise ValueError(f"sparsities must rise, in 1 .. 99 %, got {list(given)}")
        if between := [s for s in given[:-1] if s % 10]:
            raise ValueError(
                f"sparsities but for the last must be those of rounds, 10, 20, ... %, got {between}"
            )
        for name, values in (("control", self.controls), ("transfer", (self.transfer,))):
            if others := sorted(set(values) - set(given)):
                raise ValueError(
                    f"{name} sparsities must be among {list(given)}, got {others[0]}: without a "
                    "ticket of that sparsity there is nothing to compare"
                )
        if self.permuted and not self.controls:
            raise ValueError("permuted weights are tried at a control sparsity: give one")

    @property
    def sources(self) -> tuple[str, ...]:
        """What iterative tickets are drawn on."""
        return (*self.tasks, MLM) if self.universal else self.tasks

    def cells(self) -> list[Cell]:
        """Every one once, the dense runs first."""
        return [*dict.fromkeys([*self.dense(), *self.schemes(), *self.transfers()])]

    def dense(self) -> Iterable[Cell]:
        """The encoder as it is."""
        for task, seed in itertools.product(self.tasks, range(self.seeds)):
            yield Cell(task, DENSE, "", 0, seed)

    def schemes(self) -> Iterable[Cell]:
        """Every scheme at its sparsities."""
        for task, sparsity in itertools.product(self.tasks, self.sparsities):
            found = [(ITERATIVE, task), (ONE_SHOT, "")]
            if self.universal:
                found.append((ITERATIVE, MLM))
            if sparsity in self.controls:
                found += [(RANDOM, ""), (SHUFFLED, task)]
            if self.permuted and sparsity == max(self.controls):
                found.append((PERMUTED, task))
            for (scheme, source), seed in itertools.product(found, range(self.seeds)):
                yield Cell(task, scheme, source, sparsity, seed)

    def transfers(self) -> Iterable[Cell]:
        """Every ticket on every task, at one sparsity; many are among :meth:`schemes`."""
        found = [*((ITERATIVE, source) for source in self.sources), (ONE_SHOT, "")]
        for (scheme, source), task in itertools.product(found, self.tasks):
            for seed in range(self.seeds):
                yield Cell(task, scheme, source, self.transfer, seed)
