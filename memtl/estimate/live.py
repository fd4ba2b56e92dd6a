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

from .scratch import within

aten = torch.ops.aten
GRAIN = {"cuda": 512}
"""What an allocator rounds up to, where that is more than a few bytes."""
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
"""What gives memory that nobody has written to; a CPU has none of it yet."""

_ENGINE = "_engine_run_backward"  # of torch/autograd/graph.py: what calls the engine
WRAPPERS = ("torch._compile", "torch._dynamo", "torch.utils._python_dispatch")  # of a mode


class Live(TorchDispatchMode):
    """While active, adds up the bytes of all storages that are alive, and their maximum.

    It sees what operators are given back, and knows of a few what they allocate inside
    (:mod:`memtl.estimate.scratch`). Above a ``FakeTensorMode`` nothing is computed.

    Args:
        known: tensors that are there before.
        device: whose tensors count. On "cpu" memory that is not written to does not: the system
            gives a page when it is first touched.

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
        self._untouched: set[int] = set()
        for t in known:
            self._add(t)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.peak = max(self.peak, self.now)
        if self._untouched and func._schema.is_mutable:
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    self._touch(t)
        before = self.now
        out = func(*args, **(kwargs or {}))
        lazy = self._device == "cpu" and func.overloadpacket in EMPTY
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._add(t, lazy)
        if self._device == "cpu":
            self.peak = max(self.peak, before + within(func, args, out))
        # The engine adds two gradients in place where nobody else has the first; not while a mode
        # sees it: then the first goes once the sum is there. The next call sees what is left.
        if func is not aten.add.Tensor or not _called_by_the_engine():
            self.peak = max(self.peak, self.now)
        return out

    def _add(self, t: Tensor, untouched: bool = False) -> None:
        if t.device.type != self._device or t.layout != torch.strided:
            return
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = self._size(storage)

        def gone(_: object) -> None:
            del self._storages[key]
            if key in self._untouched:
                self._untouched.remove(key)
            else:
                self.now -= size

        self._storages[key] = weakref.ref(storage, gone)
        if untouched:
            self._untouched.add(key)
        else:
            self.now += size

    def _touch(self, t: Tensor) -> None:
        if t.layout != torch.strided:
            return
        storage = t.untyped_storage()
        if storage._cdata in self._untouched:
            self._untouched.remove(storage._cdata)
            self.now += self._size(storage)

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._grain) * self._grain


def _called_by_the_engine() -> bool:
    """Whether no Python of a Function or hook stands between the engine and the operator."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(WRAPPERS):
        frame = frame.f_back
    return frame.f_code.co_name == _ENGINE
