"""What methods need by the papers' definition, beside what PyTorch keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import analytic, models
from ..memory import SavedTensors
from ..methods import (
    BitFitConfig,
    FrozenConfig,
    LinearProbeConfig,
    LiteResidualConfig,
    NormTuningConfig,
    RepNetConfig,
    apply,
)
from ..methods.base.backbone import linear_classifier
from ..methods.base.stages import NoStages
from ..methods.base.transfer import TransferConfig
from ..report import Table

MB = 1e6
SAMPLES = 2  # of the forward that is measured

METHODS: dict[str, tuple[type[TransferConfig], dict[str, Any]] | None] = {
    "last": (LinearProbeConfig, {}),
    "norm+last": (NormTuningConfig, {}),
    "bias+last": (BitFitConfig, {}),
    "lite-residual": (LiteResidualConfig, {}),
    "rep-net": (RepNetConfig, {}),
    "rep-net+bias": (RepNetConfig, {"bias": True}),
    "full": None,
}
"""Method -> its configuration's class and options; None where everything trains."""


def prepare(model: Any, method: str, num_classes: int, size: int) -> None:
    """Let a method train ``model`` on images of that size, with layers as PyTorch has them.

    Raises:
        ValueError: as that method's ``apply``.
    """
    found = METHODS[method]
    if found is None:
        linear_classifier(model)
        model.reset_classifier(num_classes)
        return
    kind, options = found
    known = {field.name for field in dataclasses.fields(kind)}
    given = {"num_classes": num_classes, "convert": False, "image_size": size, **options}
    apply(model, kind(**{name: value for name, value in given.items() if name in known}))
    model.train()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One method on one model.

    Attributes:
        trainable: numbers that train.
        counted: memory by TinyTL's definition.
        stock: what PyTorch keeps for backward, in bytes a sample, measured.
        frozen: the same, of the model converted by ``FrozenConfig()``.
    """

    trainable: int
    counted: analytic.Analytic
    stock: float
    frozen: float


def estimate(
    name: str, method: str, *, batch_size: int = 8, num_classes: int = 102, size: int = 224
) -> Estimate:
    """The model of that name (random weights) trained by a method on square images.

    Args:
        name: of a classifier of timm's, or ``proxylessnas_mobile``.
        method: one of :data:`METHODS`.
        batch_size: samples of a training step.
        num_classes: of the classifier.
        size: pixels, height and width.

    Raises:
        ImportError: timm is not installed.
        ValueError: a name or number is wrong, the model has no linear classifier, or it takes no
            images of that size.
    """
    for option, value in (
        ("--batch-size", batch_size),
        ("--num-classes", num_classes),
        ("--size", size),
    ):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if method not in METHODS:
        raise ValueError(f"--methods {method}: unknown, known are {', '.join(METHODS)}")
    if name.startswith("hf:"):
        raise ValueError(f"estimate is for image classifiers of timm's, not {name}")
    torch.manual_seed(0)
    model = models.timm_model(name, size=size).train()
    images = torch.randn(SAMPLES, model.default_cfg["input_size"][0], size, size)
    try:
        prepare(model, method, num_classes, size)
        counted = analytic.profile(model, images, batch_size=batch_size)
        stock = _kept(model, images)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} takes no images of {size} x {size} pixels: {error}") from None
    apply(model, FrozenConfig())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Estimate(trainable, counted, stock, _kept(model, images))


def _kept(model: nn.Module, images: Tensor) -> float:
    """Bytes a sample that one forward keeps for backward."""
    with SavedTensors(model) as saved:
        result = model(images)
    del result
    return saved.bytes / len(images)


def table(
    model: str, methods: Sequence[str] | None, *, batch_size: int, num_classes: int, size: int
) -> str:
    """What the command prints: those methods, or all that apply, and which do not.

    Raises:
        ImportError, ValueError: as :func:`estimate`.
    """
    rows = []
    notes = []
    for method in dict.fromkeys(methods or METHODS):
        try:
            found = estimate(
                model, method, batch_size=batch_size, num_classes=num_classes, size=size
            )
        except NoStages as error:
            if methods:
                raise
            notes.append(f"{method}: {error}")
            continue
        bytes_ = (
            found.counted.parameter_bytes, found.counted.activation_bytes,
            found.counted.total_bytes, found.stock, found.frozen,
        )  # fmt: skip
        rows.append((method, f"{found.trainable:,}", *(f"{b / MB:.2f}" for b in bytes_)))
    header = (
        "MB (10^6 bytes)", "trainable", "parameters", "activations/sample",
        f"total, batch {batch_size}", "PyTorch/sample", "FrozenConfig/sample",
    )  # fmt: skip
    return (
        f"{model}, {num_classes} classes, {size} x {size} pixels\n"
        f"\n{Table(header, tuple(rows))}\n\n"
        "parameters, activations, total: analytic (TinyTL's definition): not what PyTorch needs\n"
        "PyTorch, FrozenConfig: measured, kept for backward by the model as it is, and converted"
        + "".join(f"\n{note}" for note in notes)
    )
