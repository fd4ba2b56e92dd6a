"""Which format, and which configuration, by stated rules from the measured rows.

The rule is the same for a role and for the whole: fewest bytes among the rows that meet the
thresholds, which are those of :class:`Thresholds`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from .rows import Row, Thresholds

KIB = 2**10


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is recommended, and why.

    Attributes:
        role: for which; empty for the whole configuration.
        row: the row that was chosen, or None where none will do.
        reason: a sentence.
    """

    role: str
    row: Row | None
    reason: str

    def __str__(self) -> str:
        name = self.role or "everything"
        return f"{name}: {self.row.code if self.row else 'none'}\n  {self.reason}"


def choose(rows: Sequence[Row], thresholds: Thresholds, role: str = "") -> Choice:
    """The row of fewest bytes among those that meet ``thresholds``; of equals the closer one."""
    met = [row for row in rows if not thresholds.miss(row)]
    if not met:
        closest = max(
            (row for row in rows if not row.error and math.isfinite(row.worst.worst_cosine)),
            key=lambda row: (row.worst.worst_cosine, row.mean_cosine),
            default=None,
        )
        reason = f"none of {len(rows)} meets the thresholds"
        if closest is not None:
            reason += f"; the closest, {closest.label}, has {thresholds.miss(closest)}"
        return Choice(role, None, f"{reason}.")
    best = min(met, key=lambda row: (row.bytes, -row.worst.worst_cosine))
    reason = (
        f"{best.label}: fewest bytes ({best.bytes / KIB:,.1f} KiB a sample) among {len(met)} "
        f"of {len(rows)} that meet the thresholds"
    )
    smaller = [row for row in rows if row.bytes < best.bytes]
    if smaller:
        following = max(smaller, key=lambda row: row.bytes)
        reason += (
            f"; the next smaller, {following.label} ({following.bytes / KIB:,.1f} KiB), has "
            f"{thresholds.miss(following)}"
        )
    else:
        reason += "; nothing that was measured is smaller"
    return Choice(role, best, f"{reason}.")
