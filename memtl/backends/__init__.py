"""Who computes an operator: one owner for each (operator, device), decided once at import.

On CPU the owner is the C++ extension ``memtl._C``, else the reference. On CUDA it is ``_C_cuda``
where that has the operator, else Triton, else the reference. Every other device is served by the
reference. ``MEMTL_BACKEND`` narrows the choice: ``auto`` (default), ``native``, ``triton`` or
``reference``; an explicit choice that cannot load raises :class:`BackendUnavailable` with the
reason. The dispatcher does the rest: nothing is chosen per call.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import sys
import warnings
from pathlib import Path

import torch

from .. import _ops

CHOICES = ("auto", "native", "triton", "reference")
TRITON_FIRST: frozenset[str] = frozenset()
"""Operators that Triton serves on CUDA although ``_C_cuda`` has them: those that it was measured to
compute faster (``make gpu`` names them). None so far: nothing was measured."""
_PACKAGE = Path(__file__).parent.parent


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot be used; the message says why and what helps."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One source of kernels: whether it loaded, why not, and what it brought."""

    name: str
    loaded: bool
    detail: str


_registrations = torch.library.Library("memtl", "IMPL")
_status: dict[str, Backend] = {}
_owners: dict[tuple[str, str], str] = {}


def status() -> list[Backend]:
    """Every backend, in the order in which they are asked."""
    return list(_status.values())


def owner(op: str, device: str) -> str:
    """The backend that serves ``op`` on ``device`` ("cpu", "cuda", ...)."""
    return _owners.get((op, device), "reference")


def build_record() -> dict:
    """What the build wrote down about itself; empty where memtl was never built."""
    try:
        return json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _record(name: str, loaded: bool, detail: str) -> bool:
    _status[name] = Backend(name, loaded, detail)
    return loaded


def _load_reference() -> bool:
    reference = importlib.import_module("memtl.reference")
    for name in _ops.NAMES:
        _registrations.impl(name, reference.OPS[name], "CompositeExplicitAutograd")
    return _record("reference", True, "PyTorch, every device")


def _load_cpu() -> bool:
    """``memtl._C`` registers its operators as it is imported."""
    try:
        native = importlib.import_module("memtl._C")
    except ModuleNotFoundError as error:
        if error.name != "memtl._C":
            raise
        built = build_record().get("_C", {})
        reason = (
            built.get("reason") or "it was not built: run `pip install -e .` with a C++ compiler"
        )
        return _record("native-cpu", False, reason)
    except ImportError as error:
        if "MEMTL_ISA=" in str(error):  # asked for by name, like a backend
            raise BackendUnavailable(str(error)) from error
        return _record("native-cpu", False, f"it does not load: {error}; rebuild it for this torch")
    for name in _ops.NAMES:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"memtl::{name}", "CPU"):
            _owners[name, "cpu"] = "native-cpu"
    return _record("native-cpu", True, f"C++, {native.isa()}")


def _load_cuda() -> bool:
    """``_C_cuda`` is a plain shared library: loading it registers its operators."""
    libraries = sorted(_PACKAGE.glob("_C_cuda*.so"))
    if not libraries:
        reason = build_record().get("_C_cuda", {}).get("reason") or "it was not built"
        return _record("native-cuda", False, reason)
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return _record("native-cuda", False, f"it does not load: {error}")
    for name in _ops.NAMES:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"memtl::{name}", "CUDA"):
            _owners[name, "cuda"] = "native-cuda"
    archs = build_record().get("_C_cuda", {}).get("archs", "unknown architectures")
    gpu = "" if torch.cuda.is_available() else "; no GPU in this machine"
    return _record("native-cuda", True, f"CUDA C++ for {archs}{gpu}")


def _load_triton(device: str) -> bool:
    """Triton serves what the CUDA library has not taken; interpreted, it serves the CPU."""
    try:
        kernels = importlib.import_module("memtl.kernels")
    except ImportError as error:
        return _record("triton", False, f"{error}: `pip install memtl[triton]`")
    for name, launcher in kernels.OPS.items():
        first = name in TRITON_FIRST and device == "cuda"
        if (name, device) not in _owners or first:
            _registrations.impl(name, launcher, device.upper(), allow_override=first)
            _owners[name, device] = "triton"
    return _record("triton", True, f"{len(kernels.OPS)} operators on {device}")


def _require(loaded: bool, choice: str, *names: str) -> None:
    if not loaded:
        reasons = "; ".join(f"{n}: {_status[n].detail}" for n in names)
        raise BackendUnavailable(f"MEMTL_BACKEND={choice} cannot be used: {reasons}")


def load() -> None:
    """Fill the table; called once, when memtl is imported."""
    choice = os.environ.get("MEMTL_BACKEND", "auto")
    if choice not in CHOICES:
        raise BackendUnavailable(f"MEMTL_BACKEND must be one of {CHOICES}, got {choice!r}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    left_out = f"left out by MEMTL_BACKEND={choice}"
    if choice in ("auto", "native"):
        cpu, cuda = _load_cpu(), _load_cuda()
        if choice == "native":
            _require(cpu or cuda, choice, "native-cpu", "native-cuda")
    else:
        _record("native-cpu", False, left_out)
        _record("native-cuda", False, left_out)
    if choice == "triton":
        usable = torch.cuda.is_available() or interpreted
        if not usable:
            _record("triton", False, "no GPU: set TRITON_INTERPRET=1 to run its interpreter")
        _require(usable and _load_triton("cpu" if interpreted else "cuda"), choice, "triton")
    elif choice == "auto" and torch.cuda.is_available() and not interpreted:
        _load_triton("cuda")
    else:
        _record("triton", False, left_out if choice != "auto" else "no GPU in this machine")
    _load_reference()
    if choice == "auto" and not _status["native-cpu"].loaded:
        warnings.warn(
            "memtl: CPU operators run on the PyTorch reference, several times slower than the C++ "
            f"kernels ({_status['native-cpu'].detail}). `memtl doctor` has the details.",
            RuntimeWarning,
            stacklevel=2,
        )


def report() -> str:
    """The text of ``memtl doctor``: versions, what loaded or why not, who serves what."""
    lines = [f"python {sys.version.split()[0]}, torch {torch.__version__}"]
    for module in ("triton", "timm", "transformers"):
        try:
            version = importlib.metadata.version(module)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{module} {version}")
    lines.append(
        f"torch threads {torch.get_num_threads()}, CUDA build {torch.version.cuda or 'no'}"
    )
    lines.append("")
    for backend in status():
        lines.append(f"{'ok ' if backend.loaded else 'off'} {backend.name:12} {backend.detail}")
    lines.append("")
    lines.append(f"{'operator':25} {'cpu':12} cuda")
    on_gpu = _would_serve()
    for op in _ops.NAMES:
        cuda = on_gpu.get(op, owner(op, "cuda"))
        lines.append(f"{op:25} {owner(op, 'cpu'):12} {cuda:12}".rstrip())
    return "\n".join(lines)


def _would_serve() -> dict[str, str]:
    """Who serves what on a GPU that is not here, beside the CUDA library: Triton, where it is
    installed and no backend was asked for by name."""
    if torch.cuda.is_available() or os.environ.get("MEMTL_BACKEND", "auto") != "auto":
        return {}
    try:
        kernels = importlib.import_module("memtl.kernels")
    except ImportError:
        return {}
    return {op: "triton" for op in kernels.OPS if (op, "cuda") not in _owners or op in TRITON_FIRST}
