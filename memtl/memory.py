"""Measuring what training keeps: bytes saved for backward, layer by layer, and the peak.

The headline is the saved bytes: exact, deterministic, the same on every device. The peak, from the
allocator (CUDA) or the resident set (CPU, Linux), is reported beside it, never instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module_hooks
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "Profile",
    "SavedTensors",
    "comparison",
    "freed_memory_returned",
    "peak_bytes",
    "profile",
    "saved_bytes",
    "step_seconds",
    "undisturbed",
]

MIB = 2**20
_returning = False  # whether freed_memory_returned() is active


class SavedTensors:
    """Context manager that counts what autograd saves while it is active.

    Storages are counted once, whole, whoever saves them how often; parameters and buffers of the
    modules that run, which are there anyway, are left out. What is counted is held until the
    context object goes, so that no storage is mistaken for another; FSDP frees those of gathered
    parameters underneath, so addresses would not do. Tensors without data (torch's fakes) are
    counted like any.

    Args:
        model: names the layers of the breakdown; without it they go by class.
    """

    def __init__(self, model: nn.Module | None = None):
        self._names = {} if model is None else {m: n for n, m in model.named_modules()}
        self._running: list[str] = []
        self._storages: dict[int, tuple[str, Any]] = {}
        self._own: dict[int, Any] = {}
        self._exits: list[Callable[[], Any]] = []

    def __enter__(self) -> SavedTensors:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        # Hooks of torch's own, for as long as the measurement lasts: they see every module run.
        handles = (
            _module_hooks.register_module_forward_pre_hook(self._enter_module),
            _module_hooks.register_module_forward_hook(self._leave_module, always_call=True),
        )
        hooks.__enter__()
        warned = warnings.catch_warnings()
        warned.__enter__()
        # A compiled module says of such hooks that they see it twice, which does no harm here.
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global")
        self._exits = [
            lambda: warned.__exit__(None, None, None),
            lambda: hooks.__exit__(None, None, None),
            *(h.remove for h in handles),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for leave in self._exits:
            leave()

    def _enter_module(self, module: nn.Module, _inputs: object) -> None:
        if torch.compiler.is_compiling():  # traced: the call of the compiled module counts
            return
        self._running.append(self._names.get(module, type(module).__name__))
        self._note_own(module)

    def _leave_module(self, module: nn.Module, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._running.pop()
            self._note_own(module)  # FSDP gathers a module's parameters after it was entered

    def _note_own(self, module: nn.Module) -> None:
        for t in (*module.parameters(), *module.buffers()):
            self._own.update((storage._cdata, storage) for storage in _storages_of(t))

    def _pack(self, t: Tensor) -> Tensor:
        layer = self._running[-1] if self._running else ""
        for storage in _storages_of(t):
            self._storages.setdefault(storage._cdata, (layer, storage))
        # Not t: an output that is kept by what made it would keep itself, and its graph, for ever.
        return t.detach()

    # It changes nothing of what is saved: see autograd/share.py.
    _pack.memtl_shares = True  # type: ignore[attr-defined]

    @property
    def by_layer(self) -> dict[str, int]:
        """Bytes by the innermost module that was running when a storage was first saved."""
        result: dict[str, int] = {}
        for key, (layer, storage) in self._storages.items():
            if key not in self._own and storage.nbytes():
                result[layer] = result.get(layer, 0) + storage.nbytes()
        return result

    @property
    def bytes(self) -> int:
        """All of them together."""
        return sum(self.by_layer.values())


def _storages_of(t: Tensor) -> list[torch.UntypedStorage]:
    """The storages behind a tensor: one, or those of the parts of a sparse or a wrapping one."""
    if is_lazy(t):  # has no storage yet
        return []
    if is_traceable_wrapper_subclass(t):  # a DTensor, say: what this process has of it
        inside = (getattr(t, name) for name in t.__tensor_flatten__()[0])
        tensors = (part for part in inside if isinstance(part, Tensor))
        return [storage for part in tensors for storage in _storages_of(part)]
    parts: tuple[Tensor, ...]
    if t.layout == torch.sparse_coo:
        parts = (t._indices(), t._values())
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = (t.crow_indices(), t.col_indices(), t.values())
    elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = (t.ccol_indices(), t.row_indices(), t.values())
    else:
        parts = (t,)
    return [part.untyped_storage() for part in parts]


def saved_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes that autograd keeps for backward from running ``fn(*args, **kwargs)``.

    Deduplicated by storage; parameters and buffers of the modules that run are left out. The input
    is counted where it is saved: a layer that keeps it keeps it alive.

    Raises:
        TypeError: ``fn`` cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}")
    with SavedTensors(fn if isinstance(fn, nn.Module) else None) as saved:
        result = fn(*args, **kwargs)
    del result
    return saved.bytes


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers (running statistics) and the state of the generators are as before: for a
    forward pass that only measures."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def peak_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """The most memory that was in use while ``fn()`` ran, above what was in use before.

    On CUDA from torch's allocator. On a CPU under Linux from the resident set, whose high-water
    mark the kernel resets on request: it includes what libraries allocate for themselves, and what
    the allocator kept from before (see :func:`freed_memory_returned`). None where neither is to be
    had.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or sys.platform != "linux":
        fn()
        return None
    with freed_memory_returned():
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now the present
        except OSError:
            fn()
            return None
        before = _resident("VmRSS")
        fn()
        return max(0, _resident("VmHWM") - before)


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """While active, glibc hands freed tensors back at once, and the resident set is what is in use.

    Otherwise it keeps them for later, and the peak of what runs next contains them. To compare
    peaks, put all that runs in the process before and between them inside.
    """
    global _returning
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):  # another C library
        yield
        return
    libc.malloc_trim(0)
    if _returning:  # the outermost one restores
        yield
        return
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 128 * 1024)
    _returning = True
    try:
        yield
    finally:  # what glibc arrives at by itself in a program that frees large blocks
        libc.mallopt(mmap_threshold, 32 * MIB)
        libc.mallopt(trim_threshold, 64 * MIB)
        _returning = False


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one training step of a model keeps, in bytes, also by layer; and how long it takes."""

    saved: int
    peak: int | None
    by_layer: dict[str, int]
    batch_size: int
    seconds: float | None

    @property
    def saved_per_sample(self) -> float:
        """Bytes saved for backward, divided by the batch size."""
        return self.saved / self.batch_size


def profile(model: nn.Module, *args: Any, batch_size: int = 1, **kwargs: Any) -> Profile:
    """Run forward and backward of ``model(*args, **kwargs)`` and measure them.

    The loss is the sum of every floating-point output. The peak is that of a step whose parameter
    gradients are already there, so what it shows is activations and temporaries. The time is that
    of :func:`step_seconds`. Gradients are None afterwards.

    To compare peaks on a CPU, profile both inside :func:`freed_memory_returned`, before anything
    runs outside of it; there the time is None, for it would be that of page faults.

    Raises:
        ValueError: nothing in the output depends on a parameter or input that needs a gradient.
    """

    def step() -> None:
        _sum_outputs(model(*args, **kwargs)).backward()

    device = next(model.parameters(), torch.empty(0)).device
    timed = not _returning
    with freed_memory_returned():
        step()
        with SavedTensors(model) as saved:
            total = _sum_outputs(model(*args, **kwargs))
        by_layer = saved.by_layer
        del saved, total
        peak = peak_bytes(step, device)
    model.zero_grad(set_to_none=True)
    seconds = step_seconds(model, *args, **kwargs) if timed else None
    return Profile(sum(by_layer.values()), peak, by_layer, batch_size, seconds)


def step_seconds(model: nn.Module, *args: Any, **kwargs: Any) -> float:
    """Median seconds of three steps as :func:`profile` takes them, after one to warm up."""

    def step() -> None:
        _sum_outputs(model(*args, **kwargs)).backward()

    device = next(model.parameters(), torch.empty(0)).device
    step()
    seconds = statistics.median(_seconds(step, device) for _ in range(3))
    model.zero_grad(set_to_none=True)
    return seconds


def _seconds(fn: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _sum_outputs(output: Any) -> Tensor:
    tensors = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise ValueError("no output needs a gradient: does any parameter require one?")
    return torch.stack([t.sum(dtype=torch.float32) for t in tensors]).sum()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)


def comparison(stock: Profile, converted: Profile) -> str:
    """Two profiles of one model side by side: the totals, and the layers that keep anything.

    Layers that differ only in their number share a line, their bytes added up.
    """

    def ratio(a: float | None, b: float | None) -> str:
        return f"{a / b:8.1f}x" if a and b else " " * 8 + "-"

    def mib(value: float | None) -> str:
        return "       n/a" if value is None else f"{value / MIB:10.2f}"

    rows: dict[str, list[float]] = {}
    for column, profile_ in enumerate((stock, converted)):
        for name, count in profile_.by_layer.items():
            label = re.sub(r"\b\d+\b", "*", name) or "(the model itself)"
            rows.setdefault(label, [0.0, 0.0])[column] += count / profile_.batch_size
    width = max(map(len, [*rows, "saved for backward, a sample"]))
    lines = [f"{'MiB':{width}} {'stock':>10} {'converted':>10} {'ratio':>9}"]
    for label, (a, b) in sorted(rows.items(), key=lambda row: -row[1][0]):
        lines.append(f"{label:{width}} {mib(a)} {mib(b)} {ratio(a, b)}")
    a, b = stock.saved_per_sample, converted.saved_per_sample
    lines.append(f"{'saved for backward, a sample':{width}} {mib(a)} {mib(b)} {ratio(a, b)}")
    label = f"peak of a step, batch {stock.batch_size}"
    peaks = mib(stock.peak), mib(converted.peak), ratio(stock.peak, converted.peak)
    lines.append(" ".join((f"{label:{width}}", *peaks)))
    label = f"seconds of a step, batch {stock.batch_size}"
    if stock.seconds is not None and converted.seconds is not None:
        times = f"{stock.seconds:10.3f}", f"{converted.seconds:10.3f}"
        ends = ratio(stock.seconds, converted.seconds)
        lines.append(" ".join((f"{label:{width}}", *times, ends)))
    return "\n".join(lines)
