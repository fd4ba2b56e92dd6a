"""One training step: what is built, what it is given, what its loss is, what takes the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd": (torch.optim.SGD, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adafactor": (torch.optim.Adafactor, {}),
}
"""Name -> torch's class and options."""


def optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of that name, taking the steps that torch takes on the parameters' device.

    Raises:
        ValueError: no optimizer of that name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    kind, options = OPTIMIZERS[name]
    # Torch's own choice looks at the class of the tensors, and a fake has another.
    together = parameters[0].device.type == "cuda"
    return kind(parameters, lr=1e-3, foreach=together, **options)  # type: ignore[call-arg]


def mean_loss(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    """Cross entropy of what a classifier gives, or of the ``logits`` that it has."""
    output = model(inputs)
    return F.cross_entropy(getattr(output, "logits", output), labels)


def token_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The loss that a language model of transformers computes itself."""
    return model(input_ids=inputs, labels=labels).loss


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of a model.

    Attributes:
        build: makes the model; tensors made in it may have no data.
        batch: ``(model, samples, device)`` -> inputs and labels.
        loss: ``(model, inputs, labels)`` -> a number to call ``backward`` of.
        classes: of the classifier; 0 where there is none.
        size: pixels of an image's side; 0 for text.
        name: of the model, for messages.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[Any, int, str], tuple[Any, Tensor]]
    loss: Callable[[nn.Module, Any, Tensor], Tensor] = mean_loss
    classes: int = 0
    size: int = 0
    name: str = "the model"

    @classmethod
    def of(
        cls,
        name: str,
        *,
        num_classes: int = 102,
        size: int | None = None,
        tokens: int = 128,
        language: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Step:
        """A model by name that learns classes of images or texts, or, with ``language``, to
        predict tokens.

        Args:
            name: as in :func:`memtl.models.build`.
            num_classes: of the classifier.
            size: pixels of an image's side; None: what the model was made for.
            tokens: of a text.
            options: of ``timm.create_model``, or of the configuration of transformers.

        Raises:
            ImportError: timm or transformers is not installed.
            TypeError: ``name`` is no string, or a number no int.
            ValueError: neither knows the name, a number is less than 1, or ``language`` is asked of
                a model of images.
        """
        if not isinstance(name, str):
            raise TypeError(f"a model's name must be a str, got {type(name).__name__}")
        check_count("num_classes", num_classes)
        check_count("tokens", tokens)
        if size is not None:
            check_count("size", size)
        options = dict(options or {})
        if name.startswith("hf:"):
            config = models.transformers_config(
                name[3:], hub=False, options={"num_labels": num_classes, **options}
            )

            def text_batch(model: Any, samples: int, device: str) -> tuple[Tensor, Tensor]:
                ids = torch.randint(model.config.vocab_size, (samples, tokens), device=device)
                if language:
                    return ids, ids
                return ids, torch.randint(num_classes, (samples,), device=device)

            return cls(
                lambda: models.text_model(config, language),
                text_batch,
                token_loss if language else mean_loss,
                0 if language else num_classes,
                name=name,
            )
        if language:
            raise ValueError(f"{name} reads images: it is no language model")
        channels, pixels = models.input_size(name)
        side = size or pixels

        def image_batch(model: Any, samples: int, device: str) -> tuple[Tensor, Tensor]:
            images = torch.randn(samples, channels, side, side, device=device)
            return images, torch.randint(num_classes, (samples,), device=device)

        def image_model() -> nn.Module:
            return models.timm_model(name, size=size, num_classes=num_classes, **options)

        return cls(image_model, image_batch, classes=num_classes, size=side, name=name)

    def losses(
        self, model: nn.Module, batch: tuple[Any, Tensor], autocast: torch.dtype | None = None
    ) -> Tensor:
        """The loss of a batch, under autocast to that type if there is one."""
        device = batch[1].device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return self.loss(model, *batch)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What trains.

    Raises:
        ValueError: nothing does.
    """
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ValueError("no parameter requires a gradient: nothing trains")
    return found


def check_count(name: str, value: Any) -> None:
    """Raises TypeError or ValueError where ``value`` is no int from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
