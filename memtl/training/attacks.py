"""Adversarial examples: FGSM and projected gradient descent, in the units of the image.

Goodfellow, Shlens and Szegedy: Explaining and Harnessing Adversarial Examples, ICLR 2015. Madry,
Makelov, Schmidt, Tsipras and Vladu: Towards Deep Learning Models Resistant to Adversarial Attacks,
ICLR 2018. Wong, Rice and Kolter: Fast is better than free, ICLR 2020. Zhang, Yu, Jiao, Xing,
El Ghaoui and Jordan: Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019.

Images are in [0, 1], so the model has its normalisation inside
(:class:`memtl.models.Normalized`). While an example is made, the model is in evaluation mode and
none of its parameters requires a gradient: no gradient of a parameter is computed, and nothing is
kept for one.

The gradient of a converted model goes through what the conversion keeps, as in training: of a
convolutional network with batch norms and ReLU it is exact all the same (a frozen convolution keeps
nothing, a ReLU its bit), of a transformer approximate. :mod:`memtl.training.robust` measures with
exact gradients in either case, as any other use can inside :func:`memtl.nn.exact`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loop import evaluating
from .metrics import check_labels, check_whole

NORMS = ("linf", "l2")
MODES = ("eval", "current")
Loss = Callable[[Tensor, Any], Tensor]


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

    Called, it makes the examples.

    Raises:
        TypeError, ValueError: a value is outside its range; ``eps`` or ``step_size`` above 1 in
            the maximum norm is not in pixel units.
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
            if self.norm == "linf" and value > 1:
                raise ValueError(
                    f"{name} must be in pixel units of [0, 1], got {value}: of 256 levels "
                    f"{value:g} are {value:g}/255"
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

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        loss: Loss | None = None,
        early_stop: bool = False,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial examples of ``images``, as :func:`pgd` makes them; ``start`` is where to
        begin, if not where the attack says."""
        check_model(model)
        if generator is not None and isinstance(images, Tensor):
            if generator.device.type != images.device.type:
                raise ValueError(
                    f"generator must be on the device of the images, {images.device}, got "
                    f"{generator.device}"
                )
        check_images(images, self)
        if early_stop and self.mode == "current":
            raise ValueError(
                'early_stop needs mode "eval": in training mode what the model says of an image '
                "may depend on the others of its batch, which become fewer"
            )
        if loss is None or early_stop:
            check_whole(labels)
        if early_stop and labels.shape != images.shape[:1]:
            raise ValueError(
                f"early_stop needs one class for each image, [{len(images)}], got labels "
                f"{[*labels.shape]}"
            )
        if not images.numel():
            return images.detach().clone()
        # Tensors of inference mode take no part in autograd: leave it, with copies of them.
        with torch.inference_mode(False):
            images, labels = _usable(images), _usable(labels)
            with _mode(model, self), constant_parameters(model), torch.enable_grad():
                return self._ascend(
                    model, images.detach(), labels, loss, early_stop, start, generator
                )

    def _ascend(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        loss: Loss | None,
        early_stop: bool,
        start: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        # In float32 at least: in bfloat16 a step may be less than the distance of two numbers.
        # A copy, since one that is misclassified already is returned as it is.
        near = images.to(torch.promote_types(images.dtype, torch.float32), copy=True)
        if start is not None:
            current = start.to(near)
        else:
            current = random_in_ball(near, self, generator) if self.random_start else near
        found, left = current, torch.arange(len(near), device=near.device)
        model = own(model)
        for step in range(self.steps):
            current = current.detach().requires_grad_()
            logits = model(current.to(images.dtype))
            if step == 0 and (loss is None or early_stop):
                labels = check_labels(logits, labels)
            gradient = image_gradient((loss or cross_entropy)(logits, labels), current)
            current = current.detach()
            if early_stop:
                holds = logits.detach().argmax(1) == labels
                if not holds.all():
                    left, near, labels = left[holds], near[holds], labels[holds]
                    current, gradient = current[holds], gradient[holds]
                    if not len(left):
                        break
            current = project(current + self.step * _direction(gradient, self), near, self)
            found = found.index_copy(0, left, current) if early_stop else current
        return found.detach().to(images.dtype)

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
    """One step along the sign of the gradient, from a random place in the ball (Wong et al.); from
    the image itself without ``random_start``, as it was at first (Goodfellow et al.).

    Arguments, errors and memory are those of :func:`pgd`.
    """
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
            ``[n]``, and in evaluation mode.
        generator: of the random start, on the device of ``x``; None: torch's own.

    Returns:
        As ``x``, with no graph: in [0, 1], and in the ball around it, but for the rounding of its
        dtype. It may be called inside ``torch.no_grad()`` and ``torch.inference_mode()``.

    In float16 small gradients are zero: measure robustness in float32.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``y`` no whole numbers.
        ValueError: ``x`` is not in [0, 1], as where it is normalised already; ``eps`` is more than
            an image can change; ``y`` does not fit the logits; ``early_stop`` without what it
            needs; no gradient reaches the images; or as :class:`Attack`.
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
    move in the ball, as the Kullback-Leibler divergence; means over all predictions.

    Examples are made by ascent on that divergence, beginning 0.001 of normal noise away from the
    images, where its gradient is not zero.

    Args:
        beta: at least 0.
        label_smoothing: of the cross-entropy.
        the others: as of :func:`pgd`.

    Returns:
        A scalar, with its graph.

    Raises:
        ValueError: ``beta`` is negative; or as :func:`pgd`.

    Memory: of two forwards of the model, of the images and of their examples.
    """
    attack = Attack(eps, steps, step_size, norm, False, mode)
    check_model(model)
    check_beta(beta)
    check_images(x, attack)
    with torch.no_grad(), _mode(model, attack):
        logits = model(x)
        y, target = check_labels(logits, y), _log_probabilities(logits)
    start = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    adversarial = attack(model, x, target, loss=_divergence, start=start)
    logits, moved = model(x), model(adversarial)
    natural = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    predictions = logits.numel() // logits.shape[1]
    return natural + beta * _divergence(moved, _log_probabilities(logits)) / predictions


def _usable(t: Any) -> Any:
    """A tensor of inference mode as one that autograd takes; a loss of one's own may take others
    than tensors."""
    return t.clone() if isinstance(t, Tensor) and t.is_inference() else t


def own(model: nn.Module) -> nn.Module:
    """This process's copy of a model of DistributedDataParallel: processes take different numbers
    of steps where misclassified samples are left out, and would wait for each other's buffers."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_attack(attack: Attack) -> None:
    """Raise TypeError unless it is one."""
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be a memtl.training.Attack, got {attack!r}")


def check_beta(beta: float) -> None:
    """Raise unless it is a weight of the divergence."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta must be a number, got {beta!r}")
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be at least 0 and finite, got {beta}")


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || prediction), of log-probabilities, summed."""
    return F.kl_div(_log_probabilities(logits), target, reduction="sum", log_target=True)


def _log_probabilities(logits: Tensor) -> Tensor:
    """In float32 at least: sums of many are to come."""
    return logits.log_softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the samples, so that the gradient of one does not depend on the others."""
    return F.nll_loss(_log_probabilities(logits), labels, reduction="sum")


def image_gradient(loss: Tensor, images: Tensor) -> Tensor:
    """The gradient of ``loss`` with respect to ``images``; raises as :func:`pgd` unless there is
    one, and it is finite."""
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, images, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "no gradient reaches the images: the model has a part that lets none through (a "
            "conversion to integers, detach(), or a backbone that runs without gradients)"
        )
    if not gradient.isfinite().all():
        raise FloatingPointError(
            "the gradient of an image is not finite: adversarial examples need a model whose "
            "logits are"
        )
    return gradient


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
    # By the largest first: squares of what is very small or large have no place in the dtype.
    largest = gradient.flatten(1).abs().amax(1).clamp(min=torch.finfo(gradient.dtype).tiny)
    gradient = gradient / _by_sample(largest, gradient)
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
    if x.ndim < 2:
        raise ValueError(f"images must be [n, ...], got {[*x.shape]}")
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
