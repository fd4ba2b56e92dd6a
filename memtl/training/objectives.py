"""What :func:`memtl.training.fit` can minimise beside the cross-entropy: losses that make a model
robust, and one that watches another.

An objective is called with a model, images in [0, 1], labels and label smoothing, and returns the
loss. Random numbers are torch's own, which ``fit`` seeds.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..tasks import Split
from .attacks import Attack, check_attack, check_beta, trades_loss
from .loop import Objective, loss_of
from .robust import robust_accuracy


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """The loss of adversarial examples alone (Madry et al., ICLR 2018; with an attack of one step
    Wong et al., ICLR 2020).

    Raises:
        TypeError: ``attack`` is none. Of a call: as :func:`memtl.training.attacks.pgd`.
    """

    attack: Attack

    def __post_init__(self) -> None:
        check_attack(self.attack)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        return loss_of(model, self.attack(model, images, labels), labels, label_smoothing)


@dataclasses.dataclass(frozen=True)
class Trades:
    """:func:`memtl.training.attacks.trades_loss` (Zhang et al., ICML 2019).

    Args:
        attack: its ball, steps and mode; examples begin near the image, whatever ``random_start``.
        beta: the weight of the divergence, at least 0.

    Raises:
        TypeError, ValueError: an argument is outside its range. Of a call: as ``trades_loss``.
    """

    attack: Attack
    beta: float = 6.0

    def __post_init__(self) -> None:
        check_attack(self.attack)
        check_beta(self.beta)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        a = self.attack
        return trades_loss(
            model, images, labels, a.eps, a.step_size, a.steps, a.norm,
            beta=self.beta, mode=a.mode, label_smoothing=label_smoothing,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Noisy:
    """The loss under normal noise of the deviation ``sigma``, as for randomized smoothing (Cohen,
    Rosenfeld and Kolter, ICML 2019); what is noisy may be outside [0, 1].

    Raises:
        TypeError, ValueError: ``sigma`` is no number in (0, 1].
    """

    sigma: float

    def __post_init__(self) -> None:
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, (int, float)):
            raise TypeError(f"sigma must be a number, got {self.sigma!r}")
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma must be in (0, 1], in pixel units, got {self.sigma}")

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        noisy = images + self.sigma * torch.randn_like(images)
        return loss_of(model, noisy, labels, label_smoothing)


class CatastrophicOverfitting(RuntimeError):
    """Training with one-step examples came to resist those, and nothing else."""


class Watched:
    """An objective that is watched for catastrophic overfitting (Wong, Rice and Kolter, ICLR 2020):
    from one step to the next a network that trains with one-step examples may come to withstand
    these alone. Every so many steps the batch is attacked, before it is learned from, as it is
    trained with, and by ten steps: the accuracies are alike as long as all is well. What is trained
    is the same with and without.

    Args:
        objective: of :func:`memtl.training.fit`, which trains with ``attack``.
        attack: the ten steps have its ball. Both are in evaluation mode.
        every: steps between two checks.
        gap: how much more accurate under ``attack`` than under ten steps, a fraction, ends it.

    Attributes:
        accuracies: at every check, under ``attack`` and under ten steps.

    Raises:
        TypeError, ValueError: an argument is outside its range.
        CatastrophicOverfitting: when it is called, and the gap is wider.
    """

    def __init__(self, objective: Objective, attack: Attack, *, every: int = 50, gap: float = 0.25):
        if not callable(objective):
            raise TypeError(f"objective must be callable, got {objective!r}")
        check_attack(attack)
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if isinstance(gap, bool) or not isinstance(gap, (int, float)):
            raise TypeError(f"gap must be a number, got {gap!r}")
        if not 0 < gap < 1:
            raise ValueError(f"gap must be in (0, 1), got {gap}")
        self.objective = objective
        self.attack = dataclasses.replace(attack, mode="eval")
        self.every = every
        self.gap = gap
        self.calls = 0
        self.accuracies: list[tuple[float, float]] = []

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        self.calls += 1
        if self.calls % self.every == 0:
            self._check(model, Split(images, labels))
        return self.objective(model, images, labels, label_smoothing)

    def _check(self, model: nn.Module, batch: Split) -> None:
        ten = Attack(self.attack.eps, 10, norm=self.attack.norm)
        own, other = (robust_accuracy(model, batch, attack) for attack in (self.attack, ten))
        self.accuracies.append((own, other))
        if own - other > self.gap:
            raise CatastrophicOverfitting(
                f"at step {self.calls} {own:.1%} of the batch withstand {self.attack}, but "
                f"{other:.1%} {ten}: train with more steps, a smaller eps or step size"
            )
