"""What one run measured, and what is asked of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .compare import Agreement


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to keep things, measured.

    Attributes:
        label: the configuration's name, or the format's.
        code: it, as an expression to paste.
        role: the one that was converted; empty where all were.
        error: why there are no figures; empty where there are.
        bytes: saved for backward, a sample.
        bits: an element that is kept in a format; None where nothing is.
        weights, vectors: gradients of the parameters along several axes, and of the others.
        input_cosine: of the gradient that reaches the input of the first layer.
        depths: the same for every layer, from the output to the input.
    """

    label: str
    code: str
    role: str = ""
    error: str = ""
    bytes: float = math.nan
    bits: float | None = None
    weights: Agreement = dataclasses.field(default_factory=Agreement)
    vectors: Agreement = dataclasses.field(default_factory=Agreement)
    input_cosine: float = math.nan
    depths: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def worst(self) -> Agreement:
        """Whichever of weights and vectors has the worse cosine."""
        both = [a for a in (self.weights, self.vectors) if a.compared]
        order = lambda a: (not math.isnan(a.worst_cosine), a.worst_cosine)  # noqa: E731
        return min(both, key=order, default=Agreement())

    @property
    def mean_cosine(self) -> float:
        """Over every parameter that was compared."""
        return self._mean("mean_cosine")

    @property
    def mean_error(self) -> float:
        """Over every parameter that was compared."""
        return self._mean("mean_error")

    def _mean(self, name: str) -> float:
        both = [a for a in (self.weights, self.vectors) if a.compared]
        total = sum(getattr(a, name) * a.compared for a in both)
        return total / sum(a.compared for a in both) if both else math.nan


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What gradients must reach to be called good.

    Args:
        worst: cosine of every single gradient, of parameters and of the first layer's input.
        mean: mean cosine of the weights' gradients, and of the biases' and norms'.

    Raises:
        ValueError: one is outside [0, 1].
    """

    worst: float = 0.97
    mean: float = 0.99

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name} must be a number in [0, 1], got {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be in [0, 1], got {value}")

    def __str__(self) -> str:
        return (
            f"every gradient, the first layer's input's too, has a cosine of at least "
            f"{self.worst:g}, and the means of weights and of biases and norms are at least "
            f"{self.mean:g}"
        )

    def short(self, row: Row) -> list[str]:
        """The parameters whose gradient has too small a cosine, the worst first."""
        cosines = {**row.weights.cosines, **row.vectors.cosines}
        found = [name for name, cosine in cosines.items() if not cosine >= self.worst]
        return sorted(found, key=lambda name: (not math.isnan(cosines[name]), cosines[name]))

    def miss(self, row: Row) -> str:
        """The first figure of ``row`` that falls short, in words; empty where none does."""
        if row.error:
            return f"an error: {row.error}"
        worst = row.worst
        if not worst.compared:
            return "nothing to compare"
        if not worst.worst_cosine >= self.worst:
            return f"a cosine of {worst.worst_cosine:.4f} at {worst.worst}"
        if row.depths and not row.input_cosine >= self.worst:
            return f"a cosine of {row.input_cosine:.4f} at the first layer's input"
        for what, group in (("weights", row.weights), ("biases and norms", row.vectors)):
            if group.compared and not group.mean_cosine >= self.mean:
                return f"a mean cosine of {group.mean_cosine:.4f} over {what}"
        return ""


def plain(value: Any) -> Any:
    """``value`` as JSON takes it: what is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
