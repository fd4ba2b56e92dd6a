"""What it gains to take pruned channels out of a network, on the CPU.

    python benchmarks/training/materialised.py [--threads N] [--only MODEL] [--output JSON]

Of a channel ticket by magnitude, the same share of every layer: a forward pass in evaluation mode
and a step (forward, loss, backward, SGD with momentum), of the model under the ticket's masks and
of what `Ticket.materialise` makes of it. Both take turns in one process, and medians are compared.
All models together are written to results/materialised-<processor>.json.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import memtl  # noqa: E402
from benchmarks.kernels import harness  # noqa: E402
from memtl import assets  # noqa: E402

SEED = 0
SECONDS = 10.0  # of turns, for one model at one sparsity, forward or step
BATCH = 16
SPARSITIES = (0.5, 0.7)


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=100)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn_glyphs": (lambda: assets.load("cnn_glyphs", 10), (1, 28, 28)),
    "mobilenetv2_100": (lambda: timm_model("mobilenetv2_100"), (3, 128, 128)),
    "resnet50": (lambda: timm_model("resnet50"), (3, 128, 128)),
}
"""What is pruned, and the size of an image; timm's have random weights."""


def step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Any]:
    """A step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def forward_of(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """A forward pass without gradients."""

    def forward() -> Tensor:
        with torch.no_grad():
            return model(images)

    return forward


def measure(name: str, sparsity: float) -> dict[str, Any]:
    """A row: the seconds of both, and how much smaller the network is."""
    torch.manual_seed(SEED)
    make, size = MODELS[name]
    model = make()
    config = memtl.TicketConfig(sparsity=sparsity, pattern="channel", level="layer")
    ticket = memtl.draw_ticket(model, config)
    made = ticket.materialise(model)
    if made.ticket is not None:  # the very same subnetwork trains
        made.ticket.apply(made.model)
    masked = copy.deepcopy(model)
    ticket.apply(masked, sparse=False)
    images, labels = torch.randn(BATCH, *size), torch.randint(10, (BATCH,))
    models = {"masked": masked, "materialised": made.model}
    row: dict[str, Any] = {"model": name, "sparsity": sparsity, "batch": BATCH, "size": list(size)}
    row |= {"removed": made.removed, "left": made.left, "channels": made.channels}
    row |= {"parameters": [made.parameters_before, made.parameters_after], "flops": []}
    for m in models.values():
        m.eval()
        with FlopCounterMode(display=False) as counter:
            forward_of(m, images)()
        row["flops"].append(counter.get_total_flops())
    wanted, got = (forward_of(m, images)() for m in models.values())
    row["difference"] = float((got - wanted).abs().max() / wanted.abs().max())
    forwards = {key: [forward_of(m, images)] for key, m in models.items()}
    row["forward"] = harness.interleaved_medians(forwards, harness.cpu_timer, SECONDS)
    steps = {key: [step_of(m.train(), images, labels)] for key, m in models.items()}
    row["step"] = harness.interleaved_medians(steps, harness.cpu_timer, SECONDS)
    return row


def format_row(row: dict[str, Any]) -> str:
    def gain(what: str) -> str:
        seconds = row[what]
        return f"{seconds['masked'] / seconds['materialised']:5.2f}x"

    parameters, flops = (row[key][1] / row[key][0] for key in ("parameters", "flops"))
    return (
        f"{row['model']:16} {row['sparsity']:4.0%}  parameters {parameters:5.1%}  "
        f"flops {flops:5.1%}  forward {gain('forward')}  step {gain('step')}  "
        f"difference {row['difference']:.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--only", choices=list(MODELS), metavar="MODEL", help="%(choices)s")
    parser.add_argument("--output", type=Path, help="JSON; default for all models: results/")
    options = parser.parse_args()
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.only:
        options.output = options.output or harness.result_path("materialised")
    record = harness.environment("cpu", SEED) | {"rows": []}
    print(f"{record['cpu']}, {record['threads']} threads, load {record['load_average']:.1f}")
    for name in [options.only] if options.only else MODELS:
        for sparsity in SPARSITIES:
            record["rows"].append(measure(name, sparsity))
            print(format_row(record["rows"][-1]), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {harness.relative(str(options.output.resolve()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
