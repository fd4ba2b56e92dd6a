"""Training steps: how one is made, and how the modes of a workload are measured side by side."""

import dataclasses
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import memtl
from benchmarks.kernels import harness
from memtl.methods.tickets import state_bytes
from memtl.report import ratio

from .workloads import Mode, Workload

SEED = 0
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Step:
    """A whole training step, its forward alone, the step on a batch of another size, the bytes of
    the gradients in between, and the optimizer."""

    run: Callable[[], None]
    forward: Callable[[], Tensor]
    run_on: Callable[[int], None]
    gradient_bytes: int
    optimizer: torch.optim.Optimizer


def make_step(
    workload: Workload, mode: Mode, device: str, autocast: torch.dtype | None = None
) -> Step:
    """Forward, loss, backward and AdamW on every parameter that trains, of a fresh model.

    It leaves no gradients, so that what is allocated between steps are weights and the optimizer's
    state.
    """
    torch.manual_seed(SEED)
    with torch.device(device):
        model = workload.build()
    batch = workload.batch_of(model, device)
    mode.prepare(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = mode.optimizer(model, parameters)

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        gradients = torch.set_grad_enabled(not mode.forward_only)
        with gradients, torch.autocast(device, autocast, enabled=autocast is not None):
            output = model(inputs)
            return F.cross_entropy(getattr(output, "logits", output), labels)

    def run(inputs: Tensor, labels: Tensor) -> None:
        if mode.forward_only:
            loss(inputs, labels)
            return
        loss(inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def run_on(size: int) -> None:
        run(*dataclasses.replace(workload, batch=size).batch_of(model, device))

    trained = 0 if mode.forward_only else sum(p.nbytes for p in parameters)
    return Step(partial(run, *batch), partial(loss, *batch), run_on, trained, optimizer)


def measure_memory(
    workload: Workload, mode: Mode, device: str, autocast: torch.dtype | None = None
) -> dict[str, Any]:
    """Bytes saved for backward, exact, and the peak of a step.

    The peak is the most that a step needs beyond what is allocated between steps: activations,
    gradients, temporaries. On a CPU it is right only where the process has not yet run outside of
    ``memtl.memory.freed_memory_returned()``: what was freed there stays with the process, and is
    used again without being handed back.
    """
    with memtl.memory.freed_memory_returned():
        step = make_step(workload, mode, device, autocast)
        step.run()
        return {
            "saved_bytes_per_sample": memtl.memory.saved_bytes(step.forward) / workload.batch,
            "peak_bytes": memtl.memory.peak_bytes(step.run, device),
            "gradient_bytes": step.gradient_bytes,
            "state_bytes": state_bytes(step.optimizer),
        }


def measure_times(
    workload: Workload,
    modes: Sequence[Mode],
    device: str,
    timer: harness.Timer,
    seconds: float,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Median seconds of a step of each mode, the modes taking turns."""
    calls: dict[str, Sequence[Callable[[], Any]]] = {
        mode.name: [make_step(workload, mode, device, autocast).run] for mode in modes
    }
    return harness.interleaved_medians(calls, timer, seconds)


def replayed(step: Step) -> Callable[[], None]:
    """The step, recorded once in a CUDA graph: what it takes a GPU when no host is waited for.

    Raises:
        RuntimeError: something in the step cannot be recorded.
    """
    for group in step.optimizer.param_groups:
        group["capturable"] = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()

    def replay(held: Step = step) -> None:  # the graph reads its weights and batch
        graph.replay()

    return replay


def measure_replays(
    workload: Workload,
    modes: Sequence[Mode],
    timer: harness.Timer,
    seconds: float,
    autocast: torch.dtype | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of a recorded step of each mode that can be recorded, taking turns; and why
    the others cannot."""
    calls: dict[str, Sequence[Callable[[], Any]]] = {}
    failed: dict[str, str] = {}
    for mode in modes:
        try:
            calls[mode.name] = [replayed(make_step(workload, mode, "cuda", autocast))]
        except RuntimeError as error:
            failed[mode.name] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    return (harness.interleaved_medians(calls, timer, seconds) if calls else {}), failed


def largest(fits: Callable[[int], bool], first: int, most: int = 2**14) -> int:
    """The largest batch that fits, to an eighth of it; 0 if not even one sample does.

    ``fits`` is asked of ``first``, then of twice or half of what it was asked before, then between
    the largest that did and the smallest that did not; never of more than ``most``.
    """
    good, bad = 0, most + 1
    size = first
    while size and bad - good > max(1, good // 8):
        if fits(size):
            good = size
        else:
            bad = size
        if good == 0:
            size //= 2
        else:
            size = min(2 * good, most) if bad > most else (good + bad) // 2
        if size in (good, bad):
            break
    return good


def largest_batch(
    workload: Workload, mode: Mode, budget_bytes: int, autocast: torch.dtype | None = None
) -> int:
    """The largest batch whose step a GPU with so much memory would take, weights and the
    optimizer's state included: tried out, the process being refused more."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0))
    try:
        step = make_step(dataclasses.replace(workload, batch=1), mode, "cuda", autocast)

        def fits(size: int) -> bool:
            try:
                step.run_on(size)
            except RuntimeError as error:  # torch's own kind is lost where native code allocates
                if "out of memory" not in str(error):
                    raise
                return False
            finally:
                step.optimizer.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
            return True

        return largest(fits, workload.batch)
    except torch.cuda.OutOfMemoryError:  # not even the weights fit
        return 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def in_a_child(made: Callable[[], Any]) -> Any:
    """What ``made`` returns, computed by a fork of this process.

    Raises:
        RuntimeError: it did not return; what it printed stands above.
    """
    forking = multiprocessing.get_context("fork")  # what is called need not be pickled
    receiving, sending = forking.Pipe(duplex=False)
    child = forking.Process(target=lambda: sending.send(made()))
    child.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        raise RuntimeError("a measurement ended without a result") from None
    finally:
        child.join()


def measure(
    pairs: Sequence[tuple[Workload, Sequence[Mode]]],
    device: str,
    timer: harness.Timer,
    seconds: float,
    autocast: torch.dtype | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each workload with its modes, the first of which is the baseline.

    Memory comes first, of everything (see :func:`measure_memory`); on a CPU each workload's in a
    process of its own, since what another one has left in pieces would show.
    """

    def memory_of(workload: Workload, modes: Sequence[Mode]) -> list[dict[str, Any]]:
        rows = []
        with memtl.memory.freed_memory_returned():
            for mode in modes:
                rows.append(measure_memory(workload, mode, device, autocast))
                gc.collect()  # modules and their hooks are cycles
        return rows

    apart = in_a_child if device == "cpu" and hasattr(os, "fork") else lambda made: made()
    taken = iter([row for pair in pairs for row in apart(partial(memory_of, *pair))])
    for workload, modes in pairs:
        medians = measure_times(workload, modes, device, timer, seconds, autocast)
        gc.collect()
        yield [
            {
                "mode": mode.name,
                "model": workload.title,
                "batch": workload.batch,
                "seconds": medians[mode.name],
                "relative_time": medians[mode.name] / medians[modes[0].name],
                "samples_per_second": workload.batch / medians[mode.name],
                **next(taken),
            }
            for mode in modes
        ]


def format_rows(rows: Sequence[dict[str, Any]], precision: str) -> str:
    """The rows of one workload as a table; bytes are compared with the row that keeps most;
    the state is the optimizer's."""
    most = max(rows, key=lambda row: row["saved_bytes_per_sample"])
    gradients = f"gradients {most['gradient_bytes'] / MIB:.0f} MiB"
    titles = (
        f"{'ms/step':>9} {'relative':>9} {'saved MiB/sample':>17} {'fewer':>7} {'peak MiB':>9} "
        f"{'state MiB':>9}"
    )
    setting = f"{most['model']}, batch {most['batch']}, {precision}"
    compared = f"time relative to {rows[0]['mode']}, bytes to {most['mode']} ({gradients})"
    lines = [f"{setting}; {compared}", f"{'':20} {titles}"]
    for row in rows:
        peak = "n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:.0f}"
        fewer = ratio(most["saved_bytes_per_sample"], row["saved_bytes_per_sample"])
        lines.append(
            f"{row['mode']:20} {row['seconds'] * 1e3:9.1f} {row['relative_time']:8.2f}x "
            f"{row['saved_bytes_per_sample'] / MIB:17.2f} {fewer:>7} {peak:>9} "
            f"{row['state_bytes'] / MIB:9.0f}"
        )
    return "\n".join(lines)
