"""Training steps: how one is made, and how the modes of a workload are measured side by side."""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import memtl
from benchmarks.kernels import harness

from .workloads import STOCK, Mode, Workload

SEED = 0
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Step:
    """A whole training step, its forward alone, and the bytes of the gradients in between."""

    run: Callable[[], None]
    forward: Callable[[], Tensor]
    gradient_bytes: int


def make_step(
    workload: Workload, mode: Mode, device: str, autocast: torch.dtype | None = None
) -> Step:
    """Forward, loss, backward and AdamW on every parameter, of a fresh model.

    It leaves no gradients, so that what is allocated between steps are weights and the optimizer's
    state.
    """
    torch.manual_seed(SEED)
    model = workload.build().to(device)
    inputs, labels = workload.batch_of(model, device)
    mode.prepare(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def forward() -> Tensor:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            output = model(inputs)
            return F.cross_entropy(getattr(output, "logits", output), labels)

    def run() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Step(run, forward, sum(p.nbytes for p in parameters))


def measure(
    workload: Workload,
    modes: Sequence[Mode],
    device: str,
    timer: harness.Timer,
    seconds: float,
    autocast: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Step time, bytes saved for backward and peak of each mode, a row a mode.

    The modes' steps take turns; ``STOCK`` has to be among them. Saved bytes are exact. The peak is
    the most that a step needs beyond what is allocated between steps: activations, gradients,
    temporaries.
    """
    steps = {mode.name: make_step(workload, mode, device, autocast) for mode in modes}
    calls: dict[str, Sequence[Callable[[], Any]]] = {n: [s.run] for n, s in steps.items()}
    medians = harness.interleaved_medians(calls, timer, seconds)
    rows = []
    with memtl.memory.freed_memory_returned():
        for name, step in steps.items():
            step.run()  # the first step in this state of the allocator
            gc.collect()
            rows.append(
                {
                    "mode": name,
                    "model": workload.model,
                    "batch": workload.batch,
                    "seconds": medians[name],
                    "relative_time": medians[name] / medians[STOCK.name],
                    "saved_bytes_per_sample": memtl.memory.saved_bytes(step.forward)
                    / workload.batch,
                    "peak_bytes": memtl.memory.peak_bytes(step.run, device),
                    "gradient_bytes": step.gradient_bytes,
                }
            )
    return rows


def format_rows(rows: Sequence[dict[str, Any]], precision: str) -> str:
    """The rows of :func:`measure` as a table."""
    first = rows[0]
    gradients = f"gradients {first['gradient_bytes'] / MIB:.0f} MiB"
    titles = f"{'ms/step':>9} {'of stock':>9} {'saved MiB/sample':>17} {'ratio':>7} {'peak MiB':>9}"
    lines = [
        f"{first['model']}, batch {first['batch']}, {precision}; {gradients}",
        f"{'':20} {titles}",
    ]
    stock = next(row for row in rows if row["mode"] == STOCK.name)
    for row in rows:
        peak = "n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:.0f}"
        ratio = stock["saved_bytes_per_sample"] / row["saved_bytes_per_sample"]
        lines.append(
            f"{row['mode']:20} {row['seconds'] * 1e3:9.1f} {row['relative_time']:8.2f}x "
            f"{row['saved_bytes_per_sample'] / MIB:17.2f} {ratio:6.1f}x {peak:>9}"
        )
    return "\n".join(lines)
