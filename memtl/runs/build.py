"""What a run is made of: its data, and its network as the settings say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..methods import Ticket, apply
from .settings import RunSettings

if TYPE_CHECKING:
    from .data import Data


def open_data(settings: RunSettings, model: nn.Module | None = None) -> Data:
    """The data of a run, as ``model``, or the network of its name, takes it."""
    from .data import open_data as by_name

    return by_name(
        settings.data,
        model=settings.model if model is None else model,
        size=settings.size,
        tokens=settings.tokens,
        seed=settings.seed,
        val_fraction=settings.val_fraction,
        root=settings.root,
    )


def create_model(settings: RunSettings, classes: int) -> nn.Module:
    """The network by its name, with a classifier for so many classes."""
    from .networks import create

    return create(
        settings.model,
        num_classes=classes,
        pretrained=settings.pretrained,
        size=settings.size,
    )


def prepare(model: nn.Module, settings: RunSettings) -> nn.Module:
    """``model`` with the ticket, LoRA, the methods, the layout and the checkpointing of the
    settings; new weights are drawn from torch's generator.

    Raises:
        ValueError: a method or LoRA finds nothing to change, the ticket does not fit, or the
            network has no checkpointing.
        ImportError: LoRA is wanted, but peft is not installed.
    """
    if settings.ticket is not None:
        Ticket.load(settings.ticket).apply(model)
    if settings.lora is not None:
        settings.lora.apply(model)
    for config in settings.method:
        apply(model, config)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.checkpointing:
        _checkpoint(model)
    return model


def _checkpoint(model: Any) -> None:
    inner = getattr(model, "model", model)  # transformers' in what gives its logits
    for holder in (model, inner):
        for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
            if hasattr(holder, name):
                getattr(holder, name)()
                return
    raise ValueError(
        f"checkpointing: a {type(model).__name__} has neither set_grad_checkpointing (timm) nor "
        "gradient_checkpointing_enable (transformers)"
    )
