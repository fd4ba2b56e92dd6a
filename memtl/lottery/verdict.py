"""Whether a ticket is as good as the whole network, as the paper asks it.

A ticket is *matching* if it does as well as the dense model: if its mean score is not below that of
the dense runs by more than one of their standard deviations (Chen et al. 2020, section 3).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The scores of a ticket beside those of the dense runs; one a seed each, none where one of
    the runs diverged."""

    sparsity: int
    ticket: tuple[float, ...]
    dense: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Of the ticket's scores."""
        return mean(self.ticket)

    @property
    def bound(self) -> float | None:
        """The mean of the dense scores less their sample standard deviation; of one run there is
        none."""
        return statistics.fmean(self.dense) - statistics.stdev(self.dense) if self.decided else None

    @property
    def decided(self) -> bool:
        """Whether there are dense runs enough to tell."""
        return len(self.dense) > 1

    @property
    def matching(self) -> bool | None:
        """Whether the ticket is; None where :attr:`bound` cannot be told. A ticket with a run that
        diverged is not."""
        if self.bound is None:
            return None
        return self.mean is not None and self.mean >= self.bound


def sparsest(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The matching one of the largest sparsity, whether or not those below it match."""
    return max((v for v in verdicts if v.matching), key=lambda v: v.sparsity, default=None)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where there is nothing, or one is missing."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found and len(found) == len(values) else None
