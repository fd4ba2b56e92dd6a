"""How much of a model trains, and what that keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...memory import MIB, SavedTensors, tensors_in, undisturbed
from ...nn import Layer, stock
from .transfer import Trained, check_module


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers of ``model`` train, and how many there are. A tensor of several names counts
    once, a sharded one whole, a weight in 8 bits as the numbers it stands for.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_module(model)
    trained = Trained.of(model)
    return trained.count, trained.total


def print_trainable_parameters(model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Print :func:`trainable_parameters` in peft's words; given inputs, also what a forward pass on
    them keeps for backward, and, of a converted model, sharded ones apart, what it would keep
    unconverted.

    Both are measured, by a forward pass each, in the mode that ``model`` is in; running statistics
    and random numbers stay as they are. A batch of one is enough, and an unconverted model needs
    room for it: where a GPU has none, that is said.

    Args:
        inputs, kwargs: what ``model`` is called with; the first tensor has a sample a row.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no tensor with rows in the inputs.
    """
    check_module(model)
    print(Trained.of(model).summary)
    if not inputs and not kwargs:
        return
    batch = next((len(t) for t in tensors_in([inputs, kwargs]) if t.dim() and len(t)), None)
    if batch is None:
        raise ValueError("inputs must have a tensor with a sample a row")
    line = f"saved for backward: {_saved(model, inputs, kwargs) / batch:.2f} MiB a sample"
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    if not sharded and any(isinstance(module, Layer) for module in model.modules()):
        try:
            with stock(model):
                line += f" of {_saved(model, inputs, kwargs) / batch:.2f} stock"
        except torch.OutOfMemoryError:
            line += ", where stock does not fit"
    print(f"{line} (batch {batch})")


def _saved(model: nn.Module, inputs: tuple, kwargs: dict[str, Any]) -> float:
    """MiB kept for backward."""
    with torch.enable_grad(), undisturbed(model), SavedTensors(model) as saved:
        result = model(*inputs, **kwargs)
    del result
    return saved.bytes / MIB
