"""An exponential moving average of what training changes in a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Average:
    """The average of ``model``'s trained parameters and floating-point buffers; all else is not
    averaged, since it does not change or counts something.

    Args:
        decay: of one step. The first steps decay faster, by (1 + n) / (10 + n) after n steps, so
            that where a run began is soon forgotten.

    Attributes:
        tensors: the averages, by the model's names.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._own = {
            name: t.detach()
            for name, t in model.state_dict(keep_vars=True).items()
            if t.is_floating_point() and (t.requires_grad or not isinstance(t, nn.Parameter))
        }
        self.tensors = {name: t.clone() for name, t in self._own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after that many steps."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, average in self.tensors.items():
            average.lerp_(self._own[name], share)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from these averages.

        Raises:
            ValueError: they are of another model.
        """
        if other := sorted(set(tensors) ^ set(self.tensors)):
            raise ValueError(f"the average does not fit this model: {other[0]!r} is in one of them")
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the model has the averages; afterwards its own weights again."""
        with torch.no_grad():
            own = {name: t.clone() for name, t in self._own.items()}
            for name, t in self._own.items():
                t.copy_(self.tensors[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, t in self._own.items():
                    t.copy_(own[name])
