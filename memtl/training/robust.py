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
    every so many steps the batch is attacked by ten steps, and the accuracy may not fall.

    Args:
        objective: of :func:`memtl.training.fit`, whose examples are of one step.
        attack: what it trains with; the check has its ball, and ten steps.
        every: steps between two checks.
        drop: how much less than the best accuracy so far ends the training, a fraction.

    Raises:
        CatastrophicOverfitting: when it is called, and the accuracy has fallen.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        attack: Attack,
        *,
        every: int = 50,
        drop: float = 0.2,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not 0 < drop < 1:
            raise ValueError(f"drop must be in (0, 1), got {drop}")
        self.objective = objective
        self.attack = Attack(attack.eps, 10, norm=attack.norm)
        self.every = every
        self.drop = drop
        self.calls = 0
        self.accuracies: list[float] = []

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        loss = self.objective(model, images, labels, label_smoothing)
        self.calls += 1
        if self.calls % self.every == 0:
            before = max(self.accuracies, default=0.0)
            self.accuracies.append(robust_accuracy(model, Split(images, labels), self.attack))
            if self.accuracies[-1] < before - self.drop:
                raise CatastrophicOverfitting(
                    f"at step {self.calls} {self.accuracies[-1]:.1%} of the batch withstand "
                    f"{self.attack}, after {before:.1%} before: train with more steps, a smaller "
                    "eps or step size"
                )
        return loss
