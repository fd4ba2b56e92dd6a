"""A model that normalises its input itself, and so takes images in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """``model`` behind ``(x - mean) / std``: a ball of a radius in pixels has then its meaning.

    Methods are applied to ``model``, before or after; what they save is under its names.

    Args:
        model: takes normalised images ``[n, C, H, W]``; it is the attribute ``model``.
        mean, std: in pixel units of [0, 1], a number or one a channel. They are buffers outside
            ``state_dict``.

    Raises:
        TypeError: ``model`` is no module, ``mean`` or ``std`` no numbers. Of a call: the images
            are of no floating-point dtype.
        ValueError: a deviation is not positive, the numbers of channels differ, or ``model`` has a
            normalisation already. Of a call: the images are not ``[n, C, H, W]``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if any(isinstance(module, Normalized) for module in model.modules()):
            raise ValueError(f"this {type(model).__name__} normalises its input already")
        values = [_numbers(name, v) for name, v in (("mean", mean), ("std", std))]
        if len(values[0]) != len(values[1]) or not len(values[0]):
            raise ValueError(f"mean and std must be of as many channels, got {mean} and {std}")
        if not ((values[1] > 0) & values[1].isfinite() & values[0].isfinite()).all():
            raise ValueError(f"mean must be finite and std positive, got {mean} and {std}")
        self.model = model
        for name, value in zip(("mean", "std"), values, strict=True):
            self.register_buffer(name, value.view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not x.is_floating_point():  # else the deviation would be rounded to 0
            raise TypeError(f"images must be of a floating-point dtype in [0, 1], got {x.dtype}")
        channels = self.mean.shape[1]
        if x.ndim != 4 or channels not in (1, x.shape[1]):
            wanted = "C" if channels == 1 else channels
            raise ValueError(f"images must be [n, {wanted}, H, W], got {[*x.shape]}")
        return self.model((x - self.mean.to(x.dtype)) / self.std.to(x.dtype), *args, **kwargs)

    @property
    def get_classifier(self) -> Callable[[], Any]:
        """That of the model, if it has one, as timm's do."""
        return self.model.get_classifier  # type: ignore[return-value]


def _numbers(name: str, value: float | Sequence[float]) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, or one a channel, got {value!r}") from None
