"""The state of a model, copied, and given back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """True copies of every parameter and buffer, by name (one that is shared once)."""
    return {name: t.detach().clone() for name, t in _named(model).items()}


def put_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy what :func:`state_of` returned, or a part of it, back, in place."""
    named = _named(model)
    with torch.no_grad():
        for name, value in state.items():
            tensor = named[name]
            if (tensor.device, tensor.dtype) != (value.device, value.dtype):
                tensor.data = tensor.data.to(value)
            tensor.copy_(value)


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A model as it was: every parameter and buffer, copied; gradients, what trains, and which
    modules were in training mode."""

    state: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    trains: dict[str, bool]
    training: dict[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Copy what there is now; gradients are set aside, not copied."""
        parameters = dict(model.named_parameters())
        taken = cls(
            state_of(model),
            {name: p.grad for name, p in parameters.items()},
            {name: p.requires_grad for name, p in parameters.items()},
            {name: module.training for name, module in model.named_modules()},
        )
        taken.put_mode(model)
        return taken

    def put_mode(self, model: nn.Module) -> None:
        """Give back what trains and the modes of modules; no gradients."""
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self.trains.get(name, True))
        for name, module in model.named_modules():
            module.training = self.training.get(name, module.training)

    def check_names(self, model: nn.Module) -> None:
        """Raise ValueError if ``model`` has other parameters now, by name."""
        if other := dict(model.named_parameters()).keys() ^ self.trains.keys():
            raise ValueError(f"train may not add or take away parameters, as {min(other)}")

    def check_same(self, model: nn.Module, apart: set[str]) -> None:
        """Raise ValueError if parameters, but for those of the names ``apart``, have changed."""
        for name, parameter in model.named_parameters():
            value = self.state[name]
            if name not in apart and not torch.equal(parameter.detach().to(value), value):
                raise ValueError(f"train may not change {name}, which is frozen")

    def put(self, model: nn.Module) -> None:
        """Give everything back."""
        self.put_mode(model)
        there = _named(model)  # what someone took out cannot be given back
        put_state(model, {name: t for name, t in self.state.items() if name in there})
        for name, parameter in model.named_parameters():
            parameter.grad = self.grads.get(name)
