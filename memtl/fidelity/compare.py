"""How one set of gradients compares with the exact one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from torch import Tensor

NEGLIGIBLE = 2e-6
"""Of the largest gradient's norm: below it a gradient is rounding noise and has no direction."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Gradients of several parameters against the exact ones, g against e.

    Attributes:
        mean_cosine, worst_cosine: of the angles between g and e; ``worst`` is whose the latter is.
        mean_error, largest_error: of |g - e| / |e|; ``farthest`` is whose the latter is.
        cosines: all of them, by parameter.

    A gradient that is missing or not finite compares as NaN, which is worse than anything.
    """

    mean_cosine: float = math.nan
    worst_cosine: float = math.nan
    worst: str = ""
    mean_error: float = math.nan
    largest_error: float = math.nan
    farthest: str = ""
    cosines: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def compared(self) -> int:
        """How many parameters these are; no figure is a number where there is none."""
        return len(self.cosines)


def cosine(g: Tensor, e: Tensor) -> float:
    """Of the angle between two gradients; 0 where one of them is zero."""
    a, b = g.double().flatten(), e.double().flatten()
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-300)).item()


def agreement(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Agreement:
    """Compare the gradients of every parameter that ``exact`` names."""
    cosines = {n: cosine(found[n], e) if n in found else math.nan for n, e in exact.items()}
    errors = {n: _error(found[n], e) if n in found else math.nan for n, e in exact.items()}
    if not exact:
        return Agreement()
    worst = min(cosines, key=lambda name: (not math.isnan(cosines[name]), cosines[name]))
    farthest = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return Agreement(
        mean_cosine=sum(cosines.values()) / len(cosines),
        worst_cosine=cosines[worst],
        worst=worst,
        mean_error=sum(errors.values()) / len(errors),
        largest_error=errors[farthest],
        farthest=farthest,
        cosines=cosines,
    )


def _error(g: Tensor, e: Tensor) -> float:
    return ((g.double() - e.double()).norm() / e.double().norm()).item()


@dataclasses.dataclass(frozen=True)
class Exact:
    """The exact gradients that are worth comparing with, and the names of the others."""

    weights: dict[str, Tensor]
    vectors: dict[str, Tensor]
    negligible: tuple[str, ...]


def sort(gradients: Mapping[str, Tensor]) -> Exact:
    """Weights (along more than one axis), vectors (biases, norms, scalars), rounding noise.

    Raises:
        ValueError: every gradient is zero, or one is not finite.
    """
    if wrong := [name for name, g in gradients.items() if not g.isfinite().all()]:
        raise ValueError(f"the exact gradient of {wrong[0]} is not finite")
    norms = {name: g.double().norm().item() for name, g in gradients.items()}
    largest = max(norms.values(), default=0.0)
    if largest == 0:
        raise ValueError("every exact gradient is zero: there is nothing to compare with")
    negligible = {name for name, norm in norms.items() if norm < NEGLIGIBLE * largest}
    kept = {name: g for name, g in gradients.items() if name not in negligible}
    # A scale a channel of shape [C, 1, 1, 1] is a vector, however many dimensions it is given.
    vectors = {name: g for name, g in kept.items() if g.numel() == max(g.shape, default=1)}
    weights = {name: g for name, g in kept.items() if name not in vectors}
    return Exact(weights, vectors, tuple(sorted(negligible)))
