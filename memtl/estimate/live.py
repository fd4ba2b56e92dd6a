"""Which bytes are alive while something runs: every storage from its birth to its end."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRAIN = {"cuda": 512}
"""What an allocator rounds up to, where that is more than a few bytes."""

_ENGINE = "_engine_run_backward"  # of torch/autograd/graph.py: what calls the engine


class Live(TorchDispatchMode):
    """While active, adds up the bytes of all storages that are alive, and their maximum.

    It sees what operators are given back, not what a kernel allocates and frees inside. Put it
    inside a ``FakeTensorMode``, and nothing is computed.

    Args:
        known: tensors that are there before.
        device: whose tensors count.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, known: Iterable[Tensor] = (), device: str = "cpu"):
        super().__init__()
        self.now = 0
        self.peak = 0
        self._device = device
        self._grain = GRAIN.get(device, 1)
        self._storages: dict[int, weakref.ref] = {}
        for t in known:
            self._add(t)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.peak = max(self.peak, self.now)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._add(t)
        # The engine adds two gradients in place where nobody else has the first; not while a mode
        # sees it, where the first goes only after the sum is there. The next call sees what is left.
        if func is not torch.ops.aten.add.Tensor or not _called_by_the_engine():
            self.peak = max(self.peak, self.now)
        return out

    def _add(self, t: Tensor) -> None:
        if t.device.type != self._device or t.layout != torch.strided:
            return
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // self._grain) * self._grain

        def gone(_: object) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size


def _called_by_the_engine() -> bool:
    """Whether no Python of a Function or hook stands between the engine and the operator."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        "torch.utils._python_dispatch"
    ):
        frame = frame.f_back
    return frame.f_code.co_name == _ENGINE
