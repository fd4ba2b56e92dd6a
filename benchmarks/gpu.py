"""`make gpu`, after its tests: every operator on an NVIDIA GPU, and training steps of a ViT-B/16, a
ResNet-50 and a BERT base.

    python benchmarks/gpu.py [--output FILE] [--minutes 4] [--budget-gib 16]
    python benchmarks/gpu.py --device cpu --quick     the same code, small, on a machine without one
    python benchmarks/gpu.py --floors                 what each operator has to move and multiply

Operators: tensors of 64 images, 12608 tokens of 768 or 3072 features, in bfloat16. CUDA events, and
medians of turns taken in one process, each call with a cold L2 cache. GB/s counts each argument and
result once; its share is that of copying 1 GiB on the device, a product's that of the library's own
product of two matrices of 8192 rows. The ratio is the baseline's time over the operator's. Where
another backend brings the operator too, it is one of the baselines, "triton" by name.

Training: batches of 64, autocast to bfloat16, AdamW; stock, with the library's gradient
checkpointing, LoRA, and memtl's methods; steps taking turns, as they are called and recorded in a
CUDA graph, where no host is waited for. Saved bytes are exact; the peak is the
most that a step needs beyond what is allocated between steps, weights and the optimizer's state.
The largest batch is the largest whose step runs when the process is refused more than the budget.

What there is no time left for is named, and stands in the result as left out.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # of memory that is tried for and not had

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import memtl  # noqa: E402
from benchmarks import goals  # noqa: E402
from benchmarks.kernels import harness  # noqa: E402
from benchmarks.kernels.cases import all_cases, moved_bytes  # noqa: E402
from benchmarks.training.steps import (  # noqa: E402
    SEED,
    format_rows,
    largest_batch,
    measure,
    measure_replays,
)
from benchmarks.training.workloads import (  # noqa: E402
    GPU_PAIRS,
    GPU_QUICK_PAIRS,
)

GIB = 2**30
TRAINING_SHARE = 0.45
KERNEL_SHARE = 0.4
"""Of the time, for training and for operators; the rest is for steps in CUDA graphs."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured: everything, or just enough to run every line."""

    pairs: tuple
    batch: int
    seconds: float  # for one case, and for the training steps of one mode
    copy_bytes: int
    product_size: int


FULL = Scale(GPU_PAIRS, 64, 0.4, 2**30, 8192)
QUICK = Scale(GPU_QUICK_PAIRS, 2, 0.0, 2**22, 256)


class Budget:
    """Seconds that run out."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> bool:
        return time.monotonic() < self._end


def other_backends(op: str, device: str) -> dict[str, Callable[..., Any]]:
    """Who else brings an operator that has another owner."""
    if device != "cuda" or memtl.backends.owner(op, device) == "triton":
        return {}
    from memtl import kernels

    return {"triton": kernels.OPS[op]} if op in kernels.OPS else {}


def measure_kernels(
    record: dict[str, Any], scale: Scale, device: str, timer: harness.Timer, budget: Budget
) -> None:
    """Every operator against its baselines."""
    print(f"\n{harness.HEADER}")
    for case in all_cases(scale.batch, device, torch.bfloat16):
        if not budget.left():
            record["left_out"].append(str(case))
            continue
        rows = harness.measure(
            case,
            device,
            timer,
            record["copy_gb_per_s"] * 1e9,
            scale.seconds,
            others=other_backends(case.op, device),
            product=record["product_tflop_per_s"] * 1e12,
        )
        for row in rows:
            print(harness.format_row(row), flush=True)
        record["rows"] += rows


def measure_training(
    record: dict[str, Any],
    scale: Scale,
    device: str,
    timer: harness.Timer,
    budget: Budget,
    budget_bytes: int,
) -> None:
    """Steps of every model, and the largest batches."""
    for workload, modes in scale.pairs:
        if not budget.left():
            record["left_out"].append(f"training {workload.title}")
            continue
        pair = [(workload, modes)]
        (rows,) = measure(pair, device, timer, 5 * scale.seconds, autocast=torch.bfloat16)
        for mode, row in zip(modes, rows, strict=True):
            row["largest_batch"] = None
            if device == "cuda" and budget.left():
                row["largest_batch"] = largest_batch(workload, mode, budget_bytes, torch.bfloat16)
            elif device == "cuda":
                record["left_out"].append(f"largest batch of {workload.title}, {mode.name}")
        print(f"\n{format_rows(rows, 'autocast bfloat16')}")
        if device == "cuda":
            found = ", ".join(f"{row['mode']} {row['largest_batch']}" for row in rows)
            print(f"largest batch in {budget_bytes / GIB:g} GiB: {found}")
        record["training"] += rows


def measure_graphs(
    record: dict[str, Any], scale: Scale, timer: harness.Timer, budget: Budget
) -> None:
    """The times of steps recorded in CUDA graphs, into their rows."""
    for workload, modes in scale.pairs:
        if not budget.left():
            record["left_out"].append(f"{workload.title} in CUDA graphs")
            continue
        seconds, failed = measure_replays(workload, modes, timer, 2 * scale.seconds, torch.bfloat16)
        for row in record["training"]:
            if row["model"] == workload.title:
                row["graph_seconds"] = seconds.get(row["mode"])
        stock = seconds.get(modes[0].name)
        times = (
            f"{n} {1e3 * s:.1f}" + (f" ({s / stock:.2f}x)" if stock else "")
            for n, s in seconds.items()
        )
        print(
            f"{workload.title}, ms/step in a CUDA graph: {', '.join(times) or 'none'}", flush=True
        )
        record["left_out"] += [
            f"{workload.title}, {n} in a CUDA graph: {e}" for n, e in failed.items()
        ]


def slower_owners(rows: list[dict[str, Any]]) -> list[str]:
    """Operators that something else at hand computes faster than their owner: ``TRITON_FIRST``
    of memtl.backends, or a launcher's rule, should change where that holds on every card."""
    return [
        f"{row['op']} {row['what']}: {row['served_by']} takes {1 / row['ratio']:.2f}x the time of "
        f"{row['baseline']}"
        for row in rows
        if row["baseline"] == "triton" and row["ratio"] < 1
    ]


def floors(batch: int) -> list[dict[str, Any]]:
    """Bytes that every operator has to move and operations of every product; the operators run
    once, on the CPU, to know the sizes of their results."""
    rows = []
    for case in all_cases(batch, "cpu", torch.bfloat16):
        call = case.make()["memtl"]
        rows.append(
            {
                "op": case.op,
                "what": case.what,
                "shape": case.shape,
                "moved_bytes": moved_bytes(call),  # type: ignore[arg-type]
                "flops": case.flops,
            }
        )
        print(goals.format_floor(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small and few: a trial of this code")
    parser.add_argument("--floors", action="store_true", help="arithmetic alone; no GPU is needed")
    parser.add_argument("--minutes", type=float, default=4.0, help="what begins later is left out")
    parser.add_argument("--budget-gib", type=float, default=16.0, help="of the largest batches")
    parser.add_argument("--output", type=Path, help="default on a GPU: results/gpu-<its name>.json")
    options = parser.parse_args()
    for name in ("minutes", "budget_gib"):
        if getattr(options, name) <= 0:
            parser.error(
                f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}"
            )
    torch.manual_seed(SEED)
    if options.floors:
        print(goals.FLOOR_HEADER)
        floors(FULL.batch)
        return 0
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py measures an NVIDIA GPU and torch sees none here; "
            "`--device cpu --quick` tries the code out without one, `--floors` is arithmetic alone",
            file=sys.stderr,
        )
        return 1
    scale = QUICK if options.quick else FULL
    timer = harness.cuda_timer() if device == "cuda" else harness.cpu_timer
    record = harness.environment(device, SEED)
    bandwidth = harness.copy_bandwidth(scale.copy_bytes, device, timer)
    product = harness.product_rate(scale.product_size, device, torch.bfloat16, timer)
    record |= {
        "copy_gb_per_s": bandwidth / 1e9,
        "product_tflop_per_s": product / 1e12,
        "budget_gib": options.budget_gib,
        "rows": [],
        "training": [],
        "left_out": [],
        "complete": False,
    }
    print(f"{record.get('gpu', record['cpu'])}, torch {record['torch']}, {record['backends']}")
    print(f"copy {bandwidth / 1e9:.0f} GB/s, product {product / 1e12:.0f} TFLOP/s")
    seconds = math.inf if options.quick else 60 * options.minutes
    training = Budget(seconds * TRAINING_SHARE)
    try:
        measure_training(record, scale, device, timer, training, int(options.budget_gib * GIB))
        measure_kernels(record, scale, device, timer, Budget(seconds * KERNEL_SHARE))
        if device == "cuda":
            rest = seconds * (1 - TRAINING_SHARE - KERNEL_SHARE)
            measure_graphs(record, scale, timer, Budget(rest))
        record["complete"] = True
    finally:  # what was measured until something failed, or somebody ended it, is worth keeping
        conclude(record, options.output, device)
    return 0


def conclude(record: dict[str, Any], output: Path | None, device: str) -> None:
    """Compare with the goals, print, and write the file."""
    record["slower_owners"] = slower_owners(record["rows"])
    record["goals"] = goals.compare(record)
    print(f"\n{goals.format_goals(record['goals'])}")
    for title, lines in (("left out", "left_out"), ("slower owners", "slower_owners")):
        for line in record[lines]:
            print(f"{title}: {line}")
    if output is None and device == "cuda":
        name = re.sub(r"\W+", "-", record["gpu"]).strip("-").lower()
        output = harness.RESULTS / f"gpu-{name}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {harness.relative(str(output.resolve()))}")


if __name__ == "__main__":
    sys.exit(main())
