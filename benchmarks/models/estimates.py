"""What ``memtl.estimate`` predicts against what is then measured.

Every measurement has a process of its own, so that nothing that another one freed is used again.
The peak is the high-water mark of a step above what was in use before, and the bytes of what was:
weights, the optimizer's state, the batch.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import memtl
from memtl.estimate import Step, optimizer, predict
from memtl.estimate.step import trainable
from memtl.estimate.ways import WAYS
from memtl.report import Table, environment

RESULTS = Path(__file__).parents[1] / "results"
MIB = 2**20
FIGURES = ("saved", "weights", "gradients", "optimizer", "peak")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its batch, and options of :meth:`memtl.estimate.Step.of`."""

    model: str
    batch: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ways: tuple[str, ...] = ("stock", "checkpointing", "back-razor", "low-bit")

    def step(self) -> Step:
        return Step.of(self.model, **self.options)


CASES = (
    Case("vit_tiny_patch16_224", 32),
    Case("vit_small_patch16_224", 16),
    Case("resnet18", 32),
    Case("resnet50", 16),
    Case("mobilenetv2_100", 16),
    Case("convnext_atto", 32),
    Case("hf:bert", 32, {"options": {"num_hidden_layers": 4}}),
    Case("hf:gpt2", 16, {"options": {"n_layer": 4}}),
)
QUICK = (
    Case("vit_tiny_patch16_224", 4, {"options": {"depth": 2}}),
    Case("resnet18", 4),
)
ON_A_GPU = (
    Case("vit_small_patch16_224", 64),
    Case("resnet50", 64),
    Case("mobilenetv2_100", 64),
    Case("hf:bert", 64, {"options": {"num_hidden_layers": 4}}),
)


def predicted(case: Case, way: str, device: str = "cpu") -> dict[str, int]:
    """The figures of a way to train, by prediction."""
    step = case.step()
    change = WAYS[way].change
    found = predict(step, lambda model: change(model, step), batch_size=case.batch, device=device)
    return {name: getattr(found, name) for name in FIGURES}


def measured(case: Case, way: str, device: str = "cpu") -> dict[str, int]:
    """The same figures, measured on the third step of a model of random weights.

    On a CPU the peak is right only in a process that ran nothing before.
    """
    torch.manual_seed(0)
    step = case.step()
    with memtl.memory.freed_memory_returned():
        model = step.build()
        WAYS[way].change(model, step)
        model.to(device).train()
        parameters = trainable(model)
        taken = optimizer("adamw", parameters)
        batch = step.batch(model, case.batch, device)
        gradients = 0

        def run() -> None:
            nonlocal gradients
            step.losses(model, batch).backward()
            gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            taken.step()
            taken.zero_grad()

        run()
        saved = memtl.memory.saved_bytes(step.losses, model, batch)
        peak = memtl.memory.peak_bytes(run, device)
    if peak is None:
        raise RuntimeError("no peak can be measured on this system")
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    state = sum(t.nbytes for t in tree_leaves(list(taken.state.values())) if torch.is_tensor(t))
    given = sum({t.data_ptr(): t.nbytes for t in batch}.values())
    return {
        "saved": saved,
        "weights": weights,
        "gradients": gradients,
        "optimizer": state,
        "peak": peak + weights + state + given,
    }


def in_a_process(case: Case, way: str, device: str) -> dict[str, int]:
    """:func:`measured`, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.models.estimates", "--measure"]
    given = json.dumps([case.model, case.batch, dict(case.options), way, device])
    done = subprocess.run([*command, given], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.model}, {way}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    cases: Sequence[Case], device: str, known: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """A row a model and way: what is predicted, what is measured, unless a row of ``known`` has
    that already."""
    had = {(row["model"], row["batch"], row["way"]): row["measured"] for row in known}
    rows = []
    for case in cases:
        for way in case.ways:
            row = {
                "model": case.model,
                "batch": case.batch,
                "options": dict(case.options),
                "way": way,
                "predicted": predicted(case, way, device),
                "measured": had.get((case.model, case.batch, way))
                or in_a_process(case, way, device),
            }
            rows.append(row)
            print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def error(row: Mapping[str, Any], name: str) -> float:
    """By how much the prediction is above what was measured, as a fraction of that."""
    return row["predicted"][name] / row["measured"][name] - 1


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Saved bytes and peaks, predicted and measured, in MiB."""
    cells = []
    for row in rows:
        numbers = [
            f"{row[source][name] / MIB:.1f}" if source else f"{100 * error(row, name):+.1f} %"
            for name in ("saved", "peak")
            for source in ("predicted", "measured", "")
        ]
        cells.append((f"{row['model']}, {row['batch']}", WAYS[row["way"]].title, *numbers))
    header = ("MiB", "", "saved", "measured", "error", "peak", "measured", "error")
    return str(Table(header, tuple(cells)))


def main() -> None:
    """Compare, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="two small models")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/estimates*.json")
    parser.add_argument(
        "--again", type=Path, metavar="JSON", help="predict again, and take what was measured there"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        model, batch, given, way, device = json.loads(options.measure)
        print(json.dumps(measured(Case(model, batch, given), way, device)))
        return
    on_a_gpu = options.device == "cuda"
    cases = QUICK if options.quick else ON_A_GPU if on_a_gpu else CASES
    known = json.loads(options.again.read_text())["rows"] if options.again else ()
    rows = compare(cases, options.device, known)
    print(table(rows))
    path = options.json
    if path is None and not options.quick:
        path = RESULTS / ("estimates-cuda.json" if on_a_gpu else "estimates.json")
    if path is not None:
        record = {"environment": environment(options.device), "rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
