"""Timing side by side, and what a result file says about where its figures come from."""

import datetime
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import memtl

from .cases import Case, moved_bytes

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Timer = Callable[[Callable[[], Any]], float]


def cpu_timer(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def cuda_timer(filler_bytes: int = 2**30) -> Timer:
    """A timer by CUDA events. Before each call a large copy runs, which empties the L2 cache and
    keeps the GPU busy while the host queues the call, so that launches are not timed."""
    source = torch.zeros(filler_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def timer(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        target.copy_(source)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    return timer


def interleaved_medians(
    calls: dict[str, Sequence[Callable[[], Any]]], timer: Timer, seconds: float, most: int = 50
) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns so that a disturbance meets all of them.

    A call is given as equal ones on different tensors, which take turns as well. After a round to
    warm up there are at least 5 rounds, and no more once ``seconds`` have passed or at ``most``.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for variants in calls.values():
        for call in variants:
            timer(call)
    stop = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= 5 and time.perf_counter() > stop:
            break
        for name, variants in calls.items():
            times[name].append(timer(variants[turn % len(variants)]))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(nbytes: int, device: str, timer: Timer, seconds: float = 1.0) -> float:
    """Bytes a second, read and written both counted, of copying ``nbytes`` between two tensors."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    calls = {"copy": [lambda: target.copy_(source)]}
    return 2 * nbytes / interleaved_medians(calls, timer, seconds)["copy"]


def product_rate(size: int, device: str, dtype: torch.dtype, timer: Timer) -> float:
    """Operations a second of the library's product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = interleaved_medians({"product": [lambda: a @ b]}, timer, 1.0)["product"]
    return 2 * size**3 / seconds


def measure(
    case: Case,
    device: str,
    timer: Timer,
    bandwidth: float,
    seconds: float,
    rotate_bytes: int = 0,
    others: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    product: float | None = None,
) -> list[dict[str, Any]]:
    """One row for each baseline of a case.

    With ``rotate_bytes`` the case is made on as many different tensors as have that many bytes.
    ``others``: more functions with the operator's arguments, by name, as baselines. ``product``:
    the operations a second that the rate of a product is compared with.
    """
    made = [case.make()]
    moved = moved_bytes(made[0]["memtl"])
    made += [case.make() for _ in range(min(7, rotate_bytes // moved))]
    for calls_of in made:
        for name, function in others.items():
            calls_of[name] = partial(function, *calls_of["memtl"].args)  # type: ignore[attr-defined]
    calls = {name: [calls[name] for calls in made] for name in made[0]}
    medians = interleaved_medians(calls, timer, seconds)
    ours = medians.pop("memtl")
    return [
        {
            "op": case.op,
            "what": case.what,
            "shape": case.shape,
            "served_by": memtl.backends.owner(case.op, device),
            "seconds": ours,
            "ns_per_element": ours / case.elements * 1e9,
            "gb_per_s": moved / ours / 1e9,
            "share_of_copy": moved / ours / bandwidth,
            "moved_bytes": moved,
            "flops": case.flops,
            "tflop_per_s": case.flops / ours / 1e12 if case.flops else None,
            "share_of_product": case.flops / ours / product if case.flops and product else None,
            "baseline": name,
            "baseline_seconds": theirs,
            "ratio": theirs / ours,
        }
        for name, theirs in medians.items()
    ]


HEADER = (
    f"{'operator':23} {'':14} {'shape':>17} {'served by':11} {'ms':>8} {'ns/el':>7} {'GB/s':>7} "
    f"{'of copy':>7} {'TFLOP/s':>7} {'ratio':>7}  baseline"
)


def format_row(row: dict[str, Any]) -> str:
    """A row of :func:`measure` under :data:`HEADER`; the ratio is the baseline's time over ours."""
    rate = "" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.3g}"
    return (
        f"{row['op']:23} {row['what']:14} {row['shape']:>17} {row['served_by']:11} "
        f"{row['seconds'] * 1e3:8.3f} {row['ns_per_element']:7.3f} {row['gb_per_s']:7.1f} "
        f"{row['share_of_copy']:7.1%} {rate:>7} {row['ratio']:6.2f}x  {row['baseline']}"
    )


def environment(device: str, seed: int) -> dict[str, Any]:
    """Where and from what the figures come."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *(relative(a) for a in sys.orig_argv[1:])]),
        "commit": commit(),
        "seed": seed,
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "memtl": memtl.__version__,
        "threads": torch.get_num_threads(),
        "backends": {b.name: b.detail for b in memtl.backends.status() if b.loaded},
    }
    for package in ("triton", "timm"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_capability"] = f"{properties.major}.{properties.minor}"
        facts["gpu_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["nvcc"] = _says("nvcc", "--version")
    return facts


def _says(*command: str) -> str | None:
    """The last line that a program prints; None where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[-1]


def result_path(what: str) -> Path:
    """Where a table of this machine's processor is kept: what was measured on another one stays."""
    words = re.sub(r"\((R|TM)\)|\bprocessor\b|@.*", " ", cpu_name(), flags=re.IGNORECASE)
    return RESULTS / f"{what}-{'-'.join(re.findall(r'[a-z0-9]+', words.lower()))}.json"


def relative(argument: str) -> str:
    """An argument without the repository's own path."""
    return argument.removeprefix(f"{ROOT}{os.sep}")


def cpu_name() -> str:
    """The processor's name, by Linux or by Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it; else "unknown"."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed else "")
