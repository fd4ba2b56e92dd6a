"""Running a step again and again from one state, and leaving no trace of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory
from ..autograd.keep import Function, kept
from ..storage.rebuilt import Rebuilt, laid
from .depths import Depths

Step = Callable[[nn.Module], Tensor]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one forward keeps: bytes in all; and those in a storage format, with the elements that
    they hold (tensors that are rebuilt from others count for neither)."""

    bytes: int
    packed: int
    elements: int

    @property
    def bits(self) -> float | None:
        """An element kept in a format; None where nothing is."""
        return 8 * self.packed / self.elements if self.elements else None


class Runner:
    """Runs ``step(model)`` from the same random numbers and the same buffers every time.

    Gradients are asked for and handed out: ``grad`` of no parameter is touched.

    Raises:
        TypeError: ``model`` is no module, or ``step`` cannot be called.
        ValueError: no parameter of ``model`` requires a gradient, or one that does is half wide.
    """

    def __init__(self, model: nn.Module, step: Step, seed: int):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(step):
            raise TypeError(f"step must be callable, step(model), got {type(step).__name__}")
        self.model = model
        self._step = step
        self._seed = seed
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError(f"no parameter of this {type(model).__name__} requires a gradient")
        for name, p in self._parameters.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"exact gradients are those of float32, and {name} is {p.dtype}: "
                    "measure model.float()"
                )

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        """Fixed random numbers; buffers and the generators' state are as before afterwards."""
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        devices = {t.device for t in (*self._parameters.values(),) if t.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            torch.manual_seed(self._seed)
            try:
                yield
            finally:
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(before)

    def gradients(self, seen: Callable[[str, Tensor], None]) -> tuple[dict[str, Tensor], list[str]]:
        """Gradients of the parameters that get one; and the layers, in order of execution, of
        whose inputs ``seen`` is shown the gradients."""
        with self._state(), Depths(self.model, seen) as depths:
            loss = self._loss()
            leaves = list(self._parameters.values())
            bottom = [] if depths.bottom is None else [depths.bottom]
            found = torch.autograd.grad(loss, leaves + bottom, allow_unused=True)
        named = zip(self._parameters, found, strict=False)
        return {name: g for name, g in named if g is not None}, depths.names

    def kept(self) -> Kept:
        """What the forward keeps for backward."""
        with self._state():
            with memory.SavedTensors(self.model) as saved:
                loss = self._loss()
            weights = {p.data_ptr() for p in self.model.parameters()}
            return Kept(saved.bytes, *_in_formats(loss, weights))

    def _loss(self) -> Tensor:
        loss: Any = self._step(self.model)
        if not isinstance(loss, Tensor):
            raise TypeError(f"step must return the loss, a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"the loss must be a scalar, got the shape {list(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError("the loss depends on no parameter that requires a gradient")
        if not loss.detach().isfinite():  # detached, or autograd would keep the loss for it
            raise ValueError(f"the loss is {loss.item()}")
        return loss.squeeze()


def _in_formats(loss: Tensor, weights: set[int]) -> tuple[int, int]:
    """Bytes kept in storage formats by the graph of ``loss``, and the elements they hold; but for
    the ``weights``, by their addresses, which are there anyway."""
    nodes = [loss.grad_fn]
    visited, counted = set(nodes), set()
    packed_bytes = elements = 0
    while nodes:
        node: Any = nodes.pop()
        if node is None:
            continue
        for following, _ in node.next_functions:
            if following not in visited:
                visited.add(following)
                nodes.append(following)
        own = issubclass(getattr(type(node), "_forward_cls", object), Function)
        if not own or not hasattr(node, "specs"):  # another's, or it keeps nothing in a format
            continue
        for part in kept(node)[0]:
            packed = None if part is None else laid(part)[0]
            if packed is None or isinstance(packed.format, Rebuilt):
                continue
            place = tuple(t.data_ptr() for t in packed.tensors)
            if weights.issuperset(place) or place in counted:  # by a layer that keeps the same
                continue
            counted.add(place)
            packed_bytes += packed.nbytes
            elements += packed.shape.numel()
    return packed_bytes, elements
