"""``memtl demo``: fine-tune a small network on handwritten digits several ways, and compare.

Every method starts from the same weights and sees the same batches in the same order. What it
keeps for backward, its peak and its time a step are measured on the same batch; accuracy is that
of the weights after the last step, on a test split that chose nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import assets
from .methods import BackRazorConfig, Config, LowBitConfig, apply
from .report import (
    Page,
    Point,
    Table,
    check_device,
    curves,
    environment,
    mean_std,
    origin,
    ratio,
    tradeoff,
)
from .tasks import Task, load_digits
from .training import Settings, Way, costs, evaluate, fit

EXTRAS = {"timm": "timm", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
STEPS, QUICK_STEPS = 120, 4
BATCH_SIZE = 64
ROUNDS, QUICK_ROUNDS = 10, 2
MIB, KIB = 2**20, 2**10


@dataclasses.dataclass(frozen=True)
class Network:
    """A shipped network: what it is called here and in the page, its learning rates, what to note.

    ``rate`` is that of every method that trains the whole network.
    """

    asset: str
    description: str
    last_layer_rate: float
    rate: float
    notes: str = ""


# Learning rates were chosen on the validation split: runs of STEPS steps with the seeds 100 to 102,
# which are not those of the demo, and three candidates a method. Mean validation accuracies, in %:
#   vit  last layer only    3e-3: 95.9   1e-2: 96.6   3e-2: 96.3
#        full fine-tuning   1e-3: 99.1   2e-3: 99.2   4e-3: 98.7
#        Back Razor 0.1     1e-3: 99.1   2e-3: 99.1   4e-3: 98.8
#        Back Razor 0.03    1e-3: 98.8   2e-3: 99.3   4e-3: 99.1
#   cnn  last layer only    3e-3: 97.8   1e-2: 99.1   3e-2: 99.1
#        full fine-tuning   2e-3: 99.7   4e-3: 99.6   8e-3: 99.6
#        Back Razor 0.1     2e-3: 99.8   4e-3: 99.7   8e-3: 99.2
#        Back Razor 0.03    2e-3: 99.6   4e-3: 99.6   8e-3: 99.9
# For either, 2e-3 is the best of full fine-tuning, and of Back Razor over both that it keeps.
# The preset small and four bits take that rate untuned.
NETWORKS = {
    "vit": Network("vit_glyphs", "vision transformer", 1e-2, 2e-3),
    "cnn": Network("cnn_glyphs", "MobileNetV2", 1e-2, 2e-3, """
Batch normalisation: the methods that train the whole network normalise with the statistics of the
batch. Where only the last layer trains, the rest is frozen with the statistics of the source task,
as in evaluation. Checkpointing runs each block's forward twice a step, so its running statistics,
which evaluation uses, follow the batches faster.
"""),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune a network: its name, its learning rate, what it changes in the model."""

    name: str
    network: Network
    learning_rate: float
    prepare: Callable[[nn.Module], object]


@dataclasses.dataclass
class Result:
    """Figures of one method: one batch's bytes, one step's peak and time, one entry a seed."""

    name: str
    learning_rate: float
    saved_bytes: int
    peak_bytes: int | None
    seconds_per_step: float
    test_accuracy: list[float] = dataclasses.field(default_factory=list)
    val_accuracy: list[float] = dataclasses.field(default_factory=list)
    losses: list[tuple[float, ...]] = dataclasses.field(default_factory=list)

    @property
    def saved_bytes_per_sample(self) -> float:
        return self.saved_bytes / BATCH_SIZE


FULL = "full fine-tuning"
"""The method that every ratio refers to."""

NOTES = """\
Saved bytes are counted on one training batch, from the images to the loss: every storage that
autograd holds between forward and backward, once; parameters are left out. Checkpointing holds the
inputs of the blocks; while backward runs it holds one block's recomputed activations besides, which
shows in the peak only.

The peak is what one forward and backward need beyond the model and its gradients: from the resident
set on a CPU, from torch's allocator on CUDA.

Times are medians of {rounds} whole steps (forward, loss, backward, AdamW), the methods taking
turns.

Every method starts from the same weights and sees the same batches in the same order. Learning
rates were chosen on the validation split, among as many candidates for each method that trains the
whole network; the preset small and four bits take that of full fine-tuning. Accuracy is on the test
split, after the last step.
"""
"""What a reader must know to read the figures rightly."""


def methods(network: Network, keeps: Sequence[float]) -> list[Method]:
    """The methods compared, in the order of the table."""
    rate = network.rate
    return [
        Method("last layer only", network, network.last_layer_rate, _train_head_only),
        Method(FULL, network, rate, lambda model: None),
        Method("full + checkpointing", network, rate, _checkpoint_blocks),
        *(
            Method(f"Back Razor {keep:g}", network, rate, _conversion(BackRazorConfig(keep=keep)))
            for keep in dict.fromkeys(keeps)
        ),
        Method(
            f"Back Razor {keeps[0]:g}, small",
            network,
            rate,
            _conversion(BackRazorConfig.preset("small", keep=keeps[0])),
        ),
        Method("4 bits, once", network, rate, _conversion(LowBitConfig(bits=4))),
    ]


def build(method: Method, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """The shipped network with a fresh head, which ``seed`` alone decides, ready for a method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = assets.load(method.network.asset, num_classes=10)
    method.prepare(model)
    return model.to(device)


def _checkpoint_blocks(model: Any) -> None:  # Any: methods of timm's models
    model.set_grad_checkpointing()


def _train_head_only(model: Any) -> None:
    from timm.utils import freeze

    freeze(model)  # batch normalisation too: in training mode it would still follow the batches
    model.get_classifier().requires_grad_(True)


def _conversion(config: Config) -> Callable[[nn.Module], object]:
    return lambda model: apply(model, config)


def measure(
    chosen: Sequence[Method], images: Tensor, labels: Tensor, rounds: int, progress: bool | None
) -> list[Result]:
    """What each method keeps, needs at its peak, and takes: on one batch, before any training."""
    ways = [
        Way(functools.partial(build, method, 0, images.device), images, labels) for method in chosen
    ]
    return [
        Result(m.name, m.learning_rate, cost.saved_bytes, cost.peak_bytes, cost.seconds_per_step)
        for m, cost in zip(chosen, costs(ways, rounds, progress=progress), strict=True)
    ]


def train(
    method: Method,
    task: Task,
    result: Result,
    *,
    seed: int,
    steps: int,
    device: torch.device | str,
    progress: bool | None,
) -> None:
    """One run: build, fit, test; what it was is appended to ``result``."""
    model = build(method, seed, device)
    settings = Settings(
        steps=steps, batch_size=BATCH_SIZE, learning_rate=method.learning_rate, seed=seed
    )
    history = fit(model, task.train, task.val, settings, progress=progress, description=method.name)
    result.val_accuracy.append(history.val_score)
    result.test_accuracy.append(evaluate(model, task.test))
    result.losses.append(history.losses)


def table(results: Sequence[Result]) -> Table:
    """The comparison, each cost beside its ratio to full fine-tuning."""
    base = next(r for r in results if r.name == FULL)
    header = (
        "method", "test accuracy %", "saved KiB/sample", "ratio", "peak MiB", "ratio",
        "s/step", "ratio",
    )  # fmt: skip
    rows = tuple(
        (
            r.name,
            mean_std([100 * a for a in r.test_accuracy]),
            f"{r.saved_bytes_per_sample / KIB:,.0f}",
            ratio(r.saved_bytes, base.saved_bytes),
            "n/a" if r.peak_bytes is None else f"{r.peak_bytes / MIB:,.0f}",
            ratio(r.peak_bytes, base.peak_bytes),
            f"{r.seconds_per_step:.3f}",
            ratio(r.seconds_per_step, base.seconds_per_step),
        )
        for r in results
    )
    return Table(header, rows)


def page(results: Sequence[Result], network: Network, record: dict[str, Any]) -> Page:
    """The comparison as a page: table, plots, and how everything was measured."""
    seeds, steps = record["seeds"], record["settings"]["steps"]
    base = next(r for r in results if r.name == FULL)
    unconverted = ("last", "full")
    lightest = min(
        (r for r in results if not r.name.startswith(unconverted)), key=lambda r: r.saved_bytes
    )
    gap = statistics.fmean(lightest.test_accuracy) - statistics.fmean(base.test_accuracy)
    slower = lightest.seconds_per_step / base.seconds_per_step
    millions = record["model"]["parameters"] / 1e6
    runs = "one run" if len(seeds) == 1 else f"{len(seeds)} runs"
    result = Page(
        "Fine-tuning digits, keeping less",
        f"A {network.description} of {millions:.1f} million parameters, pre-trained on printed "
        "characters, learns handwritten digits. The forward pass is exact in every method; what "
        "differs is what is trained, and what is kept in memory for backward.",
    )
    pair = f"{lightest.name} against {FULL}"
    result.tiles(
        {
            f"less kept for backward, {pair}": f"{base.saved_bytes / lightest.saved_bytes:.1f}x",
            f"points of test accuracy, {pair}": f"{100 * gap:+.1f}",
            f"the time of a step, {pair}": f"{slower:.2f}x",
        }
    )
    result.heading("Comparison")
    deviation = " ± standard deviation" if len(seeds) > 1 else ""
    result.table(
        table(results),
        f"Test accuracy: mean{deviation} over {runs} of {steps} steps, batch {BATCH_SIZE}. Ratios "
        f"are to {FULL}.",
    )
    result.heading("Accuracy against memory")
    x_label, y_label = "saved for backward, KiB a sample", "test accuracy, %"
    points = [
        Point(
            r.name,
            r.saved_bytes_per_sample / KIB,
            tuple(100 * a for a in r.test_accuracy),
        )
        for r in results
    ]
    result.figure(
        tradeoff(points, title="Accuracy against memory", x_label=x_label, y_label=y_label),
        f"Up and to the left is better. Points are means{deviation and ', bars' + deviation[2:]}.",
    )
    result.heading("Training loss")
    result.figure(
        curves(
            {r.name: r.losses[0] for r in results},
            title="Training loss",
            x_label="step",
            y_label="cross-entropy, smoothed",
        ),
        f"Seed {seeds[0]}, exponential moving average over about ten steps. With checkpointing "
        f"the curve is that of {FULL}.",
    )
    result.heading("How this was measured")
    for text in (NOTES.format(rounds=record["rounds"]) + network.notes).strip().split("\n\n"):
        result.paragraph(text)
    result.definitions(
        origin(record)
        | {
            "Seeds": ", ".join(map(str, seeds)),
            "Learning rates": "; ".join(f"{r.name} {r.learning_rate:g}" for r in results),
        }
    )
    return result


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns the exit status: 0, 1 for a failed run, 2 for a wrong call."""
    missing = [name for module, name in EXTRAS.items() if not importlib.util.find_spec(module)]
    if missing:
        print(f"memtl demo needs {', '.join(missing)}: pip install memtl[demo]", file=sys.stderr)
        return 2
    options = _parse(argv)
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    seeds = list(range(options.seeds))
    network = NETWORKS[options.model]
    chosen = methods(network, options.keep)
    task = load_digits()
    record: dict[str, Any] = {
        "command": shlex.join(["memtl", "demo", *argv]),
        "environment": environment(options.device),
        "task": {"name": task.name, "train": len(task.train), "val": len(task.val)}
        | {"test": len(task.test)},
        "model": {
            "name": network.asset,
            "sha256": assets.metadata(network.asset)["sha256"],
            "parameters": sum(p.numel() for p in assets.load(network.asset, 10).parameters()),
        },
        "settings": dataclasses.asdict(Settings(steps=steps, batch_size=BATCH_SIZE)),
        "rounds": rounds,
        "seeds": seeds,
    }
    del record["settings"]["learning_rate"], record["settings"]["seed"]  # each result has its own
    where = record["environment"]
    print(
        f"{network.asset}: {len(task.train)} handwritten digits, {len(chosen)} methods, "
        f"{len(seeds)} seed(s), {steps} steps of {BATCH_SIZE}\n"
        f"on {where['device']}, {where['threads']} threads; "
        f"operators by {', '.join(sorted(set(where['backends'].values())))}\n",
        flush=True,
    )
    started = time.perf_counter()
    batch = torch.arange(BATCH_SIZE)  # an index, not a slice: a slice would keep the whole split
    images, labels = (t[batch].to(options.device) for t in (task.train.images, task.train.labels))
    try:
        results = measure(chosen, images, labels, rounds, None)
        for seed in seeds:
            for method, result in zip(chosen, results, strict=True):
                train(
                    method, task, result, seed=seed, steps=steps, device=options.device,
                    progress=None,
                )  # fmt: skip
                accuracy = 100 * result.test_accuracy[-1]
                print(f"  seed {seed}  {method.name:22} {accuracy:5.1f} % of the test digits")
    except FloatingPointError as error:
        print(f"memtl demo: {error}", file=sys.stderr)
        return 1
    record["wall_seconds"] = time.perf_counter() - started
    print(f"\n{table(results)}\n\nratios to {FULL}; {record['wall_seconds']:.0f} s in all")
    if options.quick:
        print("a quick run: too short for its accuracies and times to mean anything")
    if options.json:
        base = next(r for r in results if r.name == FULL)
        record["methods"] = [_figures(r, base) for r in results]
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"report: {page(results, network, record).write(options.html)}")
    return 0


def _figures(result: Result, base: Result) -> dict[str, Any]:
    """A result for JSON, with derived figures."""

    def quotient(name: str) -> float | None:
        value, other = getattr(result, name), getattr(base, name)
        return value / other if value is not None and other else None

    accuracies = result.test_accuracy
    return dataclasses.asdict(result) | {
        "saved_bytes_per_sample": result.saved_bytes_per_sample,
        "test_accuracy_mean": statistics.fmean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "ratios": {
            name: quotient(name) for name in ("saved_bytes", "peak_bytes", "seconds_per_step")
        },
    }


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memtl demo",
        description="Fine-tune handwritten digits with a shipped network several ways, and compare "
        "accuracy, memory and time. Needs no download; a few minutes on two cores.",
    )
    parser.add_argument(
        "--model", choices=NETWORKS, default="vit",
        help="a vision transformer or a MobileNetV2 (vit)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=_count, default=1, metavar="N", help="runs a method (1)")
    parser.add_argument("--steps", type=_count, metavar="N", help=f"steps a run ({STEPS})")
    parser.add_argument(
        "--keep", type=_fraction, nargs="+", default=[0.1, 0.03], metavar="FRACTION",
        help="what Back Razor keeps of a linear layer's input (0.1 0.03)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--json", type=_file, metavar="PATH", help="write every figure there too")
    parser.add_argument(
        "--html", type=_file, default="demo.html", metavar="PATH", help="the report (demo.html)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"see it work: {QUICK_STEPS} steps, few measurements"
    )
    options = parser.parse_args(argv)
    try:
        check_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _fraction(text: str) -> float:
    try:
        return BackRazorConfig(keep=float(text)).keep
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot be written: {text} (is its folder there?)")
    return path
