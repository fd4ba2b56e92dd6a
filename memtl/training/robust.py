"""How robust a model is, measured: by projected gradient ascent, and by AutoAttack.

Both go by exact gradients, whatever a converted model keeps (:func:`memtl.nn.exact`): what is kept
in few bits would make the attack weaker, not the model robust.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import exact
from ..tasks import Split
from .attacks import Attack, check_attack, check_images, check_model, constant_parameters, own
from .loop import evaluating, seeded
from .metrics import check_labels, check_whole

VERSIONS = ("standard", "plus", "rand")


def robust_accuracy(
    model: nn.Module, split: Split, attack: Attack, *, batch_size: int = 256, seed: int = 0
) -> float:
    """The fraction of samples of which neither the image itself nor anything that ``attack`` passes
    on its way is misclassified. Stronger than counting where it ends, and faster: a sample that is
    misclassified is done.

    Args:
        model: takes images in [0, 1] and returns logits ``[n, C]``.
        split: images ``[n, ...]`` in [0, 1], classes ``[n]``.
        batch_size: images at a time.
        seed: of random starts; the global random state is left as it was.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`memtl.training.attacks.pgd`; ``split``
            is empty, or the attack's mode is "current".
    """
    check_attack(attack)
    right = 0
    with measuring(model, seed) as model:
        for images, labels in _batches(model, split, attack, batch_size):
            holds = rightly(model, images, labels)
            images, labels = images[holds], labels[holds]
            if len(images):
                found = attack(model, images, labels, early_stop=True)
                right += int(rightly(model, found, labels).sum())
    return right / len(split)


def autoattack(
    model: nn.Module,
    split: Split,
    eps: float,
    norm: str = "linf",
    *,
    version: str = "standard",
    batch_size: int = 250,
    seed: int = 0,
) -> float:
    """The fraction of samples that withstand AutoAttack (Croce and Hein: Reliable Evaluation of
    Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020), by the
    authors' package ``pyautoattack``. Its warnings, of randomised models say, are logged.

    The "standard" version is APGD on the cross-entropy, targeted APGD and targeted FAB on the nine
    classes next to the right one (of fewer classes all others), and 5000 queries of Square Attack.

    Args:
        model: takes images in [0, 1] and returns logits ``[n, C]``.
        split: images ``[n, C, H, W]`` in [0, 1], classes ``[n]``.
        eps, norm: as of :class:`memtl.training.Attack`.
        version: "standard", "plus" (more restarts, and the untargeted attacks), or "rand", for
            models with random numbers of their own.
        batch_size: images at a time.
        seed: of the attacks; the global random state is left as it was.

    Raises:
        TypeError: images are no floating-point tensor, labels no whole numbers.
        ValueError: an argument is outside its range, images are not in [0, 1], labels do not fit,
            or there are fewer than four classes, for which the targeted loss is not defined.
        ImportError: ``pyautoattack`` is not installed.
    """
    attack = Attack(eps, norm=norm)
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {VERSIONS}, got {version!r}")
    with measuring(model, seed) as model:
        batches = list(_batches(model, split, attack, batch_size))
        with torch.no_grad():
            for images, labels in batches:
                logits = model(images)
                check_labels(logits, labels)
            classes = logits.shape[1]
        if classes < 4:
            raise ValueError(f"AutoAttack needs at least 4 classes, got logits of {classes}")
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        ensemble = _autoattack()(
            model,
            eps=eps,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            version=version,
            seed=seed,
            device=images.device,
        )
        for targeted in (ensemble.apgd_targeted, ensemble.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        with constant_parameters(model):
            _, said = ensemble.run_standard_evaluation(images, labels, batch_size=batch_size)
    return (said == labels).double().mean().item()


def _autoattack() -> Any:
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            "AutoAttack needs the package pyautoattack: pip install pyautoattack"
        ) from error
    return AutoAttack


@contextlib.contextmanager
def measuring(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Inside, ``model`` is evaluated, its gradients are exact, random numbers are of ``seed``;
    gives the model to measure, this process's own of a data-parallel one."""
    check_model(model)
    with seeded(seed, _device(model)), evaluating(model), exact(model):
        yield own(model)


def _batches(
    model: nn.Module, split: Split, attack: Attack, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels where the model is, checked."""
    if not len(split):
        raise ValueError("cannot evaluate on an empty split")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be an int, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_whole(split.labels)
    if split.labels.ndim != 1:
        raise ValueError(f"labels must be one class an image, [n], got {[*split.labels.shape]}")
    device = _device(model)
    batches = zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)
    for images, labels in batches:
        check_images(images, attack)
        yield images.to(device), labels.to(device)


def _device(model: nn.Module) -> torch.device:
    """Of its first parameter or buffer; what has neither takes what is on the CPU."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next((t.device for t in held), torch.device("cpu"))


@torch.no_grad()
def rightly(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images are classified as their labels say, in the mode that the model is in."""
    logits = model(images)
    return logits.argmax(1) == check_labels(logits, labels)
