"""Where a figure comes from: machine, versions, who computed, and the code's commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import _ops, backends

PACKAGES = ("timm", "transformers", "scikit-learn", "numpy", "triton")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge figures measured on ``device``, ready for JSON."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "backends": {op: backends.owner(op, device.type) for op in _ops.NAMES},
        "commit": commit(),
    }


def origin(record: Mapping[str, Any]) -> dict[str, str]:
    """Where the figures of ``record``, which has a ``command`` and an ``environment``, come from:
    for :meth:`Page.definitions`."""
    where = record["environment"]
    return {
        "Command": record["command"],
        "Device": f"{where['device']}, {where['threads']} of {where['cores']} threads",
        "Operators by": ", ".join(sorted(set(where["backends"].values()))),
        "Versions": ", ".join(f"{k} {v}" for k, v in where["versions"].items()),
        "Platform": where["platform"],
        "Commit": where["commit"] or "not run from a git checkout",
    }


def check_device(device: str) -> None:
    """Raises ValueError, in one line, where torch cannot use the device of that name."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from None


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The git commit of the code that runs, ``-dirty`` if it was changed; None outside git."""

    def git(*arguments: str) -> str:
        run = ["git", "-C", str(package), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not merely inside someone's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    import memtl

    found = {
        "memtl": memtl.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
