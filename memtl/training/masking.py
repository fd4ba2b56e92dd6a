"""Whether a model is robust, or only its gradients lead nowhere.

Athalye, Carlini and Wagner: Obfuscated Gradients Give a False Sense of Security, ICML 2018. Carlini
and others: On Evaluating Adversarial Robustness, 2019. What they ask of an evaluation is measured
here, on one batch: where an answer is wrong, the accuracy under a gradient attack says nothing of
the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..tasks import Split
from .attacks import (
    Attack,
    check_attack,
    check_images,
    constant_parameters,
    cross_entropy,
    image_gradient,
    project,
    random_in_ball,
)
from .metrics import check_labels, check_whole
from .robust import measuring, rightly, robust_accuracy

NOISE = 1e-4
"""How much logits of two passes may differ, relative to their length: sums in another order."""


class _Row(NamedTuple):
    """What was measured, the measure, whether it is right, and what is wrong otherwise."""

    what: str
    value: str
    right: bool = True
    wrong: str = ""


@dataclasses.dataclass(frozen=True)
class GradientCheck:
    """What :func:`check_gradients` measured; accuracies and shares are fractions of the images.

    Attributes:
        attack: whose gradients are in question.
        accuracy: without an attack.
        chance: one over the number of classes.
        randomness: the most by which logits of an image differ between two passes, relative to
            their length.
        zero_gradients: the share of images whose every gradient is exactly zero.
        one_step: accuracy under one step.
        iterative: accuracy under ``attack``.
        losses: (steps, mean cross-entropy after as many), from the same start and of the same size.
        by_eps: (eps, accuracy) from half the attack's to the largest there is.
        random: accuracy under random points in the ball, as many as ``attack`` has steps.
        random_search: accuracy under a search without gradients, of ``queries`` queries.
        queries: passes of that search.
        tolerance: how far an accuracy, or a loss relative to another, may be on the wrong side.
    """

    attack: Attack
    accuracy: float
    chance: float
    randomness: float
    zero_gradients: float
    one_step: float
    iterative: float
    losses: tuple[tuple[int, float], ...]
    by_eps: tuple[tuple[float, float], ...]
    random: float
    random_search: float
    queries: int
    tolerance: float

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence for each sign of masked gradients; none where there is no sign."""
        return tuple(row.wrong for row in self._rows() if not row.right)

    @property
    def ok(self) -> bool:
        """Whether there is no sign of masked gradients."""
        return not self.failures

    def _rows(self) -> Iterator[_Row]:
        reached, least = self.iterative, self.iterative - self.tolerance
        yield _Row(
            "two passes differ by",
            f"{self.randomness:.2g}",
            self.randomness <= NOISE,
            "the model is random: gradients must be averaged over what is random in it",
        )
        zero = f"{self.zero_gradients:.1%}"
        yield _Row(
            "images without a gradient",
            zero,
            self.zero_gradients <= self.tolerance,
            f"the gradient is exactly zero for {zero} of the images",
        )
        yield _Row("accuracy", f"{self.accuracy:.1%}")
        yield _Row(f"under {self.attack}", f"{reached:.1%}")
        for name, accuracy, what in (
            ("one step", self.one_step, "one step is"),
            ("random points", self.random, "random points are"),
            (f"{self.queries} queries", self.random_search, "a search without gradients is"),
        ):
            yield _Row(
                f"under {name}",
                f"{accuracy:.1%}",
                accuracy >= least,
                f"{what} stronger than the attack: {accuracy:.1%} withstand, not {reached:.1%}",
            )
        yield _Row("loss after one step", f"{self.losses[0][1]:.4g}")
        for (fewer, before), (steps, loss) in itertools.pairwise(self.losses):
            yield _Row(
                f"loss after {steps} steps",
                f"{loss:.4g}",
                loss >= before * (1 - self.tolerance),
                f"the loss falls from {before:.4g} after {fewer} to {loss:.4g} after {steps} steps",
            )
        first, (steps, last) = self.losses[0][1], self.losses[-1]
        yield _Row(
            "they raise it by",
            f"{last - first:.4g}",
            last > first,
            f"more steps do not raise the loss: {first:.4g} after one, {last:.4g} after {steps}",
        )
        yield _Row(f"accuracy at eps {self.by_eps[0][0]:.4g}", f"{self.by_eps[0][1]:.1%}")
        for (smaller, before), (eps, accuracy) in itertools.pairwise(self.by_eps):
            yield _Row(
                f"accuracy at eps {eps:.4g}",
                f"{accuracy:.1%}",
                accuracy <= before + self.tolerance,
                f"accuracy rises from {before:.1%} at eps {smaller:.4g} to {accuracy:.1%} at "
                f"{eps:.4g}",
            )
        eps, unbounded = self.by_eps[-1]
        yield _Row(
            "the last of them above chance",
            f"{max(0.0, unbounded - self.chance):.1%}",
            unbounded <= self.chance + self.tolerance,
            f"{unbounded:.1%} withstand an attack without a bound (eps {eps:.4g}); chance is "
            f"{self.chance:.1%}",
        )

    def __str__(self) -> str:
        rows = list(self._rows())
        width = max(len(row.what) for row in rows)
        lines = [
            f"{row.what:{width}} {row.value:>8}{'' if row.right else '  WRONG'}" for row in rows
        ]
        return "\n".join(lines + [f"- {sentence}" for sentence in self.failures])


def check_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    queries: int = 200,
    tolerance: float = 0.02,
    seed: int = 0,
) -> GradientCheck:
    """Measure on one batch whether the gradients of ``model`` can be trusted to find adversarial
    examples. Some hundred images tell; exact gradients are measured, whatever is kept
    (:func:`memtl.nn.exact`).

    Args:
        model: takes images in [0, 1] and returns logits ``[n, C]``.
        images: ``[n, channels, height, width]`` in [0, 1], on the model's device.
        labels: ``[n]`` int64, there too.
        attack: of several steps, in evaluation mode.
        queries: passes of a search without gradients.
        tolerance: fraction of the images by which an attack may seem stronger than another, and by
            which a loss may fall.
        seed: of starts and searches; the global random state is left as it was.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`memtl.training.attacks.pgd`, where no
            gradient reaches the images too; an argument is outside its range; there are no images.

    Memory: as ``attack``. Time: some six such attacks, and ``queries`` passes.
    """
    _check(images, labels, attack, queries, tolerance)
    split = Split(images, labels)

    def accuracy(attack: Attack) -> float:
        return robust_accuracy(model, split, attack, batch_size=len(images), seed=seed)

    with measuring(model, seed) as model, constant_parameters(model):
        with torch.no_grad():
            logits, again = model(images), model(images)
            labels = check_labels(logits, labels)
        lengths = logits.norm(dim=1).clamp(min=torch.finfo(logits.dtype).tiny)
        gradient = _gradient_of(model, images, labels)
        return GradientCheck(
            attack=attack,
            accuracy=_share(rightly(model, images, labels)),
            chance=1 / logits.shape[1],
            randomness=((logits - again).norm(dim=1) / lengths).max().item(),
            zero_gradients=_share((gradient == 0).flatten(1).all(1)),
            one_step=accuracy(dataclasses.replace(attack, steps=1, step_size=None)),
            iterative=accuracy(attack),
            losses=_losses(model, images, labels, attack, seed),
            by_eps=tuple((a.eps, accuracy(a)) for a in _by_eps(attack, images)),
            random=_random_points(model, images, labels, attack),
            random_search=_share(_random_search(model, images, labels, attack, queries)),
            queries=queries,
            tolerance=float(tolerance),
        )


def _check(images: Tensor, labels: Tensor, attack: Attack, queries: int, tolerance: float) -> None:
    check_attack(attack)
    if attack.steps < 2:
        raise ValueError(f"attack must have several steps, got {attack}")
    check_images(images, attack)
    check_whole(labels)
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"images must be [n, C, H, W], and some, got {[*images.shape]}")
    if isinstance(queries, bool) or not isinstance(queries, int):
        raise TypeError(f"queries must be an int, got {queries!r}")
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance must be a number, got {tolerance!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


def _gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        images, labels = images.clone().requires_grad_(), labels.clone()
        return image_gradient(cross_entropy(model(images), labels), images)


def _losses(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, seed: int
) -> tuple[tuple[int, float], ...]:
    counts = sorted({1, math.ceil(attack.steps / 4), math.ceil(attack.steps / 2), attack.steps})
    losses, step = [], min(attack.step, 1.0) if attack.norm == "linf" else attack.step
    for steps in counts:
        shorter = dataclasses.replace(attack, steps=steps, step_size=step)
        with measuring(model, seed) as model:  # the same start
            found = shorter(model, images, labels)
        with torch.no_grad():
            losses.append(cross_entropy(model(found), labels).item() / len(images))
    return tuple(zip(counts, losses, strict=True))


def _by_eps(attack: Attack, images: Tensor) -> list[Attack]:
    """The attack with half its radius, with its own, with twice that, and without a bound."""
    largest = 1.0 if attack.norm == "linf" else math.sqrt(images[0].numel())
    radii = sorted({attack.eps / 2, attack.eps, min(2 * attack.eps, largest), largest})
    # No step is longer than an image is wide: it would end at the same corner.
    steps = [min(attack.step * eps / attack.eps, largest) for eps in radii]
    return [
        dataclasses.replace(attack, eps=eps, step_size=step)
        for eps, step in zip(radii, steps, strict=True)
    ]


def _random_points(model: nn.Module, images: Tensor, labels: Tensor, attack: Attack) -> float:
    holds = rightly(model, images, labels)
    for _ in range(attack.steps):
        holds &= rightly(model, random_in_ball(images, attack), labels)
    return _share(holds)


@torch.no_grad()
def _random_search(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, queries: int
) -> Tensor:
    """Which images withstand a search after Square Attack (Andriushchenko, Croce, Flammarion and
    Hein, ECCV 2020): squares of one colour, smaller and smaller, are added where they bring the
    logit of the class nearer to the largest of the others."""
    holds = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    left = torch.arange(len(images), device=images.device)
    current, best = images, torch.full((len(images),), math.inf, device=images.device)
    for query in range(queries + 1):  # the first one is of the images themselves
        trial = current
        if query:
            area = 0.5 * (1 - (query - 1) / queries) ** 2
            trial = project(current + _squares(images[left], attack, area), images[left], attack)
        margin = _margin(model(trial), labels[left])
        better = margin < best
        best = torch.where(better, margin.to(best), best)
        current = torch.where(better.view(-1, 1, 1, 1), trial, current)
        still = best > 0
        left, current, best = left[still], current[still], best[still]
        if not len(left):
            break
    holds[left] = True
    return holds


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the logit of the class is above all others."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf)
    return own[:, 0] - others.amax(1)


def _squares(images: Tensor, attack: Attack, area: float) -> Tensor:
    """One square in each image, which covers ``area`` of it, up or down in each channel: as far as
    the ball is wide in the maximum norm, as long as its radius in L2."""
    n, channels, height, width = images.shape
    side = min(max(1, round(math.sqrt(area * height * width))), height, width)

    def inside(length: int) -> Tensor:
        first = torch.randint(length - side + 1, (n, 1), device=images.device)
        place = torch.arange(length, device=images.device)
        return (place >= first) & (place < first + side)

    covered = inside(height)[:, None, :, None] & inside(width)[:, None, None, :]
    signs = torch.randint(2, (n, channels, 1, 1), device=images.device) * 2 - 1
    size = 2 * attack.eps if attack.norm == "linf" else attack.eps / (side * math.sqrt(channels))
    return size * (signs * covered).to(images.dtype)
