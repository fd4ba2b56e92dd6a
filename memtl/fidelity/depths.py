"""The gradients that reach the inputs of layers, as they pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Depths:
    """Context manager: ``seen(name, gradient)`` for the input of every layer, while it is active.

    A layer is a module with parameters of its own, its input the first floating-point tensor among
    its arguments; a tensor that is the input of several counts for the first of them. Where the
    first layer with something to train takes an input that needs no gradient, it is made to need
    one, so that there is a gradient to see at the very bottom.

    Attributes:
        names: of the layers, in the order in which they ran; a second call is ``name (2)``.
        bottom: the tensor that was made to need a gradient; backward must be asked for it.
    """

    def __init__(self, model: nn.Module, seen: Callable[[str, Tensor], None]):
        self._model = model
        self._seen = seen
        self._inputs: list[Tensor] = []  # held: while they are, no other has their identity
        self._handles: list[Any] = []
        self.names: list[str] = []
        self.bottom: Tensor | None = None

    def __enter__(self) -> Depths:
        for name, module in self._model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                hook = self._hook(name or "(the model itself)")
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.append(handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()

    def _hook(self, name: str) -> Callable[..., tuple[tuple, dict] | None]:
        calls = itertools.count(1)

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = next(filter(_floating, (*args, *kwargs.values())), None)
            if x is None or not torch.is_grad_enabled():
                return None
            replaced = None
            if not x.requires_grad:
                trains = any(p.requires_grad for p in module.parameters(recurse=False))
                if self.names or not trains:
                    return None
                self.bottom = x.detach().requires_grad_()
                y = self.bottom.clone()  # no leaf: it may be changed in place
                replaced = (
                    tuple(y if a is x else a for a in args),
                    {key: y if a is x else a for key, a in kwargs.items()},
                )
                x = y
            if any(x is other for other in self._inputs):
                return replaced
            self._inputs.append(x)
            call = next(calls)
            label = name if call == 1 else f"{name} ({call})"
            self.names.append(label)
            x.register_hook(lambda gradient: self._seen(label, gradient))
            return replaced

        return before


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
