"""Adversarial examples: FGSM and projected gradient descent, in the units of the image.

Goodfellow, Shlens and Szegedy: Explaining and Harnessing Adversarial Examples, ICLR 2015. Madry,
Makelov, Schmidt, Tsipras and Vladu: Towards Deep Learning Models Resistant to Adversarial Attacks,
ICLR 2018. Wong, Rice and Kolter: Fast is better than free, ICLR 2020. Zhang, Yu, Jiao, Xing,
El Ghaoui and Jordan: Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019.

Images are in [0, 1], so the model has its normalisation inside
(:class:`memtl.models.Normalized`). While an example is made, the model is in evaluation mode and
none of its parameters requires a gradient: no gradient of a parameter is computed, and nothing is
kept for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loop import evaluating, loss_of

NORMS = ("linf", "l2")
MODES = ("eval", "current")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on the loss; every value is validated here.

    Args:
        eps: radius of the ball around an image, in pixel units: 8/255, where a pixel has 256
            levels.
        steps: how often the gradient is followed.
        step_size: how far; None: 2.5 eps / steps, for one step 1.25 eps.
        norm: of the ball and of a step, "linf" or "l2".
        random_start: begin anywhere in the ball, not at the image.
        mode: "eval": the model is in evaluation mode meanwhile; "current": in the mode it is in,
            where batch norms in training mode see, and count, the examples.

    Raises:
        TypeError, ValueError: a value is outside its range; ``eps`` above 1 in the maximum norm is
            no radius in pixel units.
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    random_start: bool = True
    mode: str = "eval"

    def __post_init__(self) -> None:
        for name, wanted in (("norm", NORMS), ("mode", MODES)):
            if getattr(self, name) not in wanted:
                raise ValueError(f"{name} must be one of {wanted}, got {getattr(self, name)!r}")
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            if name == "step_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(
                f"eps must be in pixel units of [0, 1], got {self.eps}: of 256 levels "
                f"{self.eps:g} are {self.eps:g}/255"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"steps must be an int, got {self.steps!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def step(self) -> float:
        """The step size that is taken."""
        if self.step_size is not None:
            return self.step_size
        return self.eps * (1.25 if self.steps == 1 else 2.5 / self.steps)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, **options) -> Tensor:
        """Adversarial examples of ``images``, as :func:`pgd` makes them."""
        return _ascend(self, model, images, labels, **options)

    def __str__(self) -> str:
        name = "FGSM" if self.steps == 1 else f"PGD-{self.steps}"
        return f"{name}, {'L-inf' if self.norm == 'linf' else 'L2'} {self.eps:g}"


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    step_size: float | None = None,
    *,
    random_start: bool = True,
    mode: str = "eval",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One step along the sign of the gradient, from a random place in the ball (Wong et al.).

    Args:
        step_size: None: 1.25 ``eps``; without a random start ``eps``.

    The others, errors and memory are those of :func:`pgd`.
    """
    if step_size is None and not random_start:
        step_size = eps
    attack = Attack(eps, 1, step_size, random_start=random_start, mode=mode)
    return attack(model, x, y, generator=generator)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    step_size: float | None = None,
    steps: int = 10,
    norm: str = "linf",
    *,
    random_start: bool = True,
    mode: str = "eval",
    loss: Loss | None = None,
    early_stop: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the loss of ``model``.

    Args:
        model: takes images in [0, 1] and returns logits ``[n, C]``, or ``[n, C, H, W]``.
        x: ``[n, ...]`` in [0, 1], of a floating-point dtype.
        y: what ``loss`` takes; by default classes ``[n]``, or ``[n, H, W]``.
        eps, step_size, steps, norm, random_start, mode: as of :class:`Attack`.
        loss: of logits and ``y``, summed over the samples; default the cross-entropy.
        early_stop: a sample that is misclassified is left as it is, which is faster; of classes
            ``[n]`` only.
        generator: of the random start, on the device of ``x``; None: torch's own.

    Returns:
        As ``x``, with no graph: in the ball around it, and in [0, 1].

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: ``x`` is not in [0, 1], as where it is normalised already; ``eps`` is more than
            an image can change; or as :class:`Attack`.
        FloatingPointError: a gradient is not finite.

    Memory: forward and backward of the model for the gradient of ``x`` alone; no gradient of a
    parameter, whose ``grad`` stays as it is.
    """
    attack = Attack(eps, steps, step_size, norm, random_start, mode)
    return attack(model, x, y, loss=loss, early_stop=early_stop, generator=generator)


def trades_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    step_size: float | None = None,
    steps: int = 10,
    norm: str = "linf",
    *,
    beta: float = 6.0,
    mode: str = "eval",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of TRADES: the cross-entropy of the images, and ``beta`` times how far predictions
    move in the ball, as the Kullback-Leibler divergence.

    Examples are made by ascent on that divergence, beginning 0.001 of normal noise away from the
    images, where its gradient is not zero.

    Returns:
        A scalar, with its graph.

    Raises:
        ValueError: ``beta`` is negative; or as :func:`pgd`, where the other arguments are
            explained.
    """
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    attack = Attack(eps, steps, step_size, norm, False, mode)
    check_images(x, attack)
    with torch.no_grad(), _mode(model, attack):
        target = model(x).log_softmax(1)
    start = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    adversarial = attack(model, x, target, loss=_divergence, start=start)
    logits, moved = model(x), model(adversarial)
    natural = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return natural + beta * _divergence(moved, logits.log_softmax(1)) / len(x)


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || prediction), of log-probabilities, summed."""
    return F.kl_div(logits.log_softmax(1), target, reduction="sum", log_target=True)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the samples, so that the gradient of one does not depend on the others."""
    return F.cross_entropy(logits, labels, reduction="sum")


def _ascend(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss | None = None,
    early_stop: bool = False,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    check_images(x, attack)
    x = x.detach()
    if not len(x):
        return x.clone()
    if start is None:
        start = random_in_ball(x, attack, generator) if attack.random_start else x.clone()
    found = start
    left = torch.arange(len(x), device=x.device)
    near, labels, current = x, y, start
    objective = loss or cross_entropy
    with _mode(model, attack), constant_parameters(model), torch.enable_grad():
        for _ in range(attack.steps):
            current.requires_grad_()
            logits = model(current)
            (gradient,) = torch.autograd.grad(objective(logits, labels), current)
            current = current.detach()
            if not gradient.isfinite().all():
                raise FloatingPointError(
                    "the gradient of an image is not finite: adversarial examples need a model "
                    "whose logits are"
                )
            if early_stop:
                holds = logits.detach().argmax(1) == labels
                if not holds.all():
                    left, near, labels = left[holds], near[holds], labels[holds]
                    current, gradient = current[holds], gradient[holds]
                    if not len(left):
                        break
            current = project(current + attack.step * _direction(gradient, attack), near, attack)
            if early_stop:
                found = found.index_copy(0, left, current)
            else:
                found = current
    return found


@torch.no_grad()
def random_in_ball(x: Tensor, attack: Attack, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly random in the ball of ``attack`` around each of ``x``, then moved into [0, 1]."""
    if attack.norm == "linf":
        noise = torch.empty_like(x).uniform_(-attack.eps, attack.eps, generator=generator)
    else:
        noise = torch.empty_like(x).normal_(generator=generator)
        radius = torch.empty(len(x), device=x.device, dtype=x.dtype)
        radius = radius.uniform_(generator=generator) ** (1 / x[0].numel())
        noise = noise * _by_sample(attack.eps * radius / _norms(noise), x)
    return project(x + noise, x, attack)


@torch.no_grad()
def project(moved: Tensor, x: Tensor, attack: Attack) -> Tensor:
    """The nearest of what is in the ball of ``attack`` around ``x``, and then in [0, 1]."""
    change = moved - x
    if attack.norm == "linf":
        change = change.clamp(-attack.eps, attack.eps)
    else:
        change = change * _by_sample((attack.eps / _norms(change)).clamp(max=1), x)
    return (x + change).clamp(0, 1)


def _direction(gradient: Tensor, attack: Attack) -> Tensor:
    if attack.norm == "linf":
        return gradient.sign()
    return gradient / _by_sample(_norms(gradient), gradient)


def _norms(x: Tensor) -> Tensor:
    tiny = torch.finfo(x.dtype).tiny
    return x.flatten(1).norm(dim=1).clamp(min=tiny)


def _by_sample(factors: Tensor, like: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (like.ndim - 1))


def check_images(x: Tensor, attack: Attack) -> None:
    """Raise unless ``x`` are images in [0, 1], which the ball of ``attack`` does not exceed."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"images must be a floating-point tensor in [0, 1], got {got}")
    if not x.numel():
        return
    low, high = x.detach().aminmax()
    if not (low >= 0 and high <= 1):  # nor NaN
        raise ValueError(
            f"images must be in [0, 1], got {low.item():.4g} .. {high.item():.4g}: are they "
            "normalised already? That is done inside the model (memtl.models.Normalized), once"
        )
    farthest = math.sqrt(x[0].numel())
    if attack.norm == "l2" and attack.eps > farthest:
        raise ValueError(
            f"eps must be in pixel units of [0, 1], got {attack.eps}: between images of "
            f"{x[0].numel()} numbers the L2 distance is at most {farthest:.4g}"
        )


@contextlib.contextmanager
def constant_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of ``model`` requires a gradient; afterwards those that did do."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _mode(model: nn.Module, attack: Attack) -> contextlib.AbstractContextManager[None]:
    return evaluating(model) if attack.mode == "eval" else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """An objective of :func:`memtl.training.fit`: the loss of adversarial examples alone."""

    attack: Attack

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        return loss_of(model, self.attack(model, images, labels), labels, label_smoothing)


@dataclasses.dataclass(frozen=True)
class Trades:
    """An objective of :func:`memtl.training.fit`: :func:`trades_loss`."""

    attack: Attack
    beta: float = 6.0

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
    """An objective of :func:`memtl.training.fit`: the loss under normal noise of the deviation
    ``sigma``, as for randomized smoothing (Cohen, Rosenfeld and Kolter, ICML 2019)."""

    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma must be in (0, 1], in pixel units, got {self.sigma}")

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        noisy = images + self.sigma * torch.randn_like(images)
        return loss_of(model, noisy, labels, label_smoothing)
