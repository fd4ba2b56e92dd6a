"""How robust a model is, measured: by projected gradient descent, by AutoAttack; and whether
training with one step has stopped to make it so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..tasks import Split
from .attacks import Attack
from .loop import evaluating, seeded


def robust_accuracy(
    model: nn.Module, split: Split, attack: Attack, *, batch_size: int = 256, seed: int = 0
) -> float:
    """The fraction of samples of which neither the image itself nor anything that ``attack`` passes
    on its way is misclassified. Stronger than counting where it ends, and faster: a sample that is
    misclassified is done.

    Args:
        model: takes images in [0, 1] and returns logits ``[n, C]``.
        seed: of random starts.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`memtl.training.attacks.pgd`; ``split``
            is empty.
    """
    if not len(split):
        raise ValueError("cannot evaluate on an empty split")
    device = next(model.parameters()).device
    right = 0
    batches = zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)
    with seeded(seed, device):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            holds = _right(model, images, labels)
            images, labels = images[holds], labels[holds]
            if len(images):
                found = attack(model, images, labels, early_stop=True)
                right += int(_right(model, found, labels).sum())
    return right / len(split)


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with evaluating(model):
        return model(images).argmax(1) == labels


class CatastrophicOverfitting(RuntimeError):
    """Training with one-step examples came to resist those, and nothing else."""


class Watched:
    """An objective that is watched for catastrophic overfitting (Wong, Rice and Kolter, ICLR 2020):
    from one step to the next a network that trains with one-step examples may come to withstand
    these alone. Every so many steps the batch is attacked as it is trained with, and by ten steps:
    the accuracies are alike as long as all is well.

    Args:
        objective: of :func:`memtl.training.fit`, which trains with ``attack``.
        attack: the ten steps have its ball.
        every: steps between two checks.
        gap: how much more accurate under ``attack`` than under ten steps, a fraction, ends it.

    Attributes:
        accuracies: at every check, under ``attack`` and under ten steps.

    Raises:
        CatastrophicOverfitting: when it is called, and the gap is wider.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        attack: Attack,
        *,
        every: int = 50,
        gap: float = 0.25,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not 0 < gap < 1:
            raise ValueError(f"gap must be in (0, 1), got {gap}")
        self.objective = objective
        self.attack = attack
        self.every = every
        self.gap = gap
        self.calls = 0
        self.accuracies: list[tuple[float, float]] = []

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        loss = self.objective(model, images, labels, label_smoothing)
        self.calls += 1
        if self.calls % self.every == 0:
            ten = Attack(self.attack.eps, 10, norm=self.attack.norm, mode=self.attack.mode)
            batch = Split(images, labels)
            own, other = (robust_accuracy(model, batch, a) for a in (self.attack, ten))
            self.accuracies.append((own, other))
            if own - other > self.gap:
                raise CatastrophicOverfitting(
                    f"at step {self.calls} {own:.1%} of the batch withstand {self.attack}, but "
                    f"{other:.1%} {ten}: train with more steps, a smaller eps or step size"
                )
        return loss
