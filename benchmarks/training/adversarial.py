"""Adversarial training with less memory: is it as robust?

    python benchmarks/training/adversarial.py [--steps N] [--seeds N] [--threads N] [--output FILE]

The shipped convolutional network that was pre-trained adversarially is fine-tuned on digits, ink in
[0, 1], on adversarial examples of three steps (PGD-3, L-inf 0.1), by each mode of storage and with
every seed. Measured are bytes kept
for backward, of the training pass and of the attack's, the time of a whole step (the modes taking
turns in one process), and the accuracies on the test split: of the images, and of those under
PGD-20. Without --steps and --seeds the result is written to
results/adversarial-<processor>.json.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import memtl  # noqa: E402
from benchmarks.kernels import harness  # noqa: E402
from memtl import assets  # noqa: E402
from memtl.methods import Config  # noqa: E402
from memtl.models import Normalized  # noqa: E402
from memtl.tasks import Split, Task, load_digits  # noqa: E402
from memtl.tasks.digits import MEAN, STD  # noqa: E402
from memtl.training import (  # noqa: E402
    Adversarial,
    Attack,
    Settings,
    Step,
    fit,
    robust_accuracy,
    seeded,
)

MODES: dict[str, Config | None] = {
    "stock": None,
    "Back Razor, keep 0.1": memtl.BackRazorConfig(keep=0.1),
    "Back Razor small, 0.1": memtl.BackRazorConfig.preset("small", keep=0.1),
    "4 bits, once": memtl.LowBitConfig(bits=4),
}
"""What backward is kept in; the first is the baseline."""

TRAINED = Adversarial(Attack(0.1, 3, step_size=0.2 / 3))
REPORTED = Attack(0.1, 20, step_size=0.025)
STEPS, SEEDS, BATCH, RATE = 120, 3, 64, 2e-3
START = "cnn_glyphs_pgd"


def build(config: Config | None, seed: int) -> nn.Module:
    """The network with a fresh head of that seed, in training mode."""
    with seeded(seed):
        model = Normalized(assets.load(START, 10), MEAN, STD)
    if config is not None:
        memtl.apply(model, config)
    return model.train()


def saved(model: nn.Module, batch: Split) -> dict[str, float]:
    """Bytes a sample that backward keeps: of the training pass, and of a step of the attack."""
    images, labels = batch.images, batch.labels

    def loss(x: Any) -> Tensor:
        return F.cross_entropy(model(x), labels)

    with seeded(0):
        trained = memtl.memory.saved_bytes(loss, images)
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        attacked = memtl.memory.saved_bytes(
            lambda x: F.cross_entropy(frozen(x), labels), images.clone().requires_grad_()
        )
    return {
        "saved_bytes_per_sample": trained / len(batch),
        "attack_saved_bytes_per_sample": attacked / len(batch),
    }


def step_seconds(task: Task, settings: Settings, seconds: float) -> dict[str, float]:
    """Median seconds of a whole step, examples and all, of each mode."""
    batch = first_batch(task.train, settings)
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, config in MODES.items():
        step = Step(build(config, 0), settings, objective=TRAINED)
        calls[name] = [lambda step=step: step(batch.images, batch.labels)]  # type: ignore[misc]
    with seeded(0):
        return harness.interleaved_medians(calls, harness.cpu_timer, seconds, settings.steps - 1)


def first_batch(split: Split, settings: Settings) -> Split:
    """The first images of a split."""
    return Split(split.images[: settings.batch_size], split.labels[: settings.batch_size])


def runs(task: Task, steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """One row for each seed and mode: what fine-tuning gives."""
    for seed in range(seeds):
        for name, config in MODES.items():
            settings = Settings(steps=steps, batch_size=BATCH, learning_rate=RATE, seed=seed)
            model = build(config, seed)
            history = fit(model, task.train, task.test, settings, objective=TRAINED, progress=False)
            yield {
                "mode": name,
                "seed": seed,
                "accuracy": history.val_score,
                "robust_accuracy": robust_accuracy(model, task.test, REPORTED),
                "final_loss": statistics.fmean(history.losses[-10:]),
            }


def summary(record: dict[str, Any]) -> str:
    """The means over seeds as a table; bytes and times relative to the baseline."""
    stock = record["modes"][0]
    titles = (
        ("fewer", 7),
        ("attack", 8),
        ("step", 7),
        ("accuracy", 10),
        ("robust", 8),
        ("points", 8),
    )
    lines = [f"{'':22}{'KiB/sample':>11}" + "".join(f"{name:>{width}}" for name, width in titles)]
    means = {}
    for row in record["modes"]:
        of_mode = [run for run in record["runs"] if run["mode"] == row["mode"]]
        clean, robust = (
            100 * statistics.fmean(run[key] for run in of_mode)
            for key in ("accuracy", "robust_accuracy")
        )
        means[row["mode"]] = robust
        kept = row["saved_bytes_per_sample"]
        lines.append(
            f"{row['mode']:22}{kept / 1024:11.0f}{stock['saved_bytes_per_sample'] / kept:6.1f}x"
            f"{row['attack_saved_bytes_per_sample'] / 1024:8.0f}{row['relative_time']:6.2f}x"
            f"{clean:10.1f}{robust:8.1f}{robust - means[stock['mode']]:+8.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch and of the kernels")
    parser.add_argument("--steps", type=int, help=f"of a run (default: {STEPS})")
    parser.add_argument("--seeds", type=int, help=f"runs of each mode (default: {SEEDS})")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    for name in ("threads", "steps", "seeds"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.steps is None and options.seeds is None:  # a part does not replace the whole
        options.output = options.output or harness.result_path("adversarial")
    steps, seeds = options.steps or STEPS, options.seeds or SEEDS
    settings = Settings(steps=steps, batch_size=BATCH, learning_rate=RATE)
    task = load_digits(normalised=False)

    record = harness.environment("cpu", 0)
    record |= {
        "model": START, "task": "digits, ink in [0, 1]", "steps": steps, "batch": BATCH,
        "learning_rate": RATE, "trained_with": str(TRAINED.attack),
        "robust_accuracy_under": str(REPORTED), "modes": [], "runs": [],
    }  # fmt: skip
    print(f"{record['cpu']}, {record['threads']} threads, {record['backends']}")
    seconds = step_seconds(task, settings, 60.0 if steps == STEPS else 0.0)
    stock = next(iter(seconds.values()))
    for name, config in MODES.items():
        row = {"mode": name, "seconds": seconds[name], "relative_time": seconds[name] / stock}
        row |= saved(build(config, 0), first_batch(task.train, settings))
        record["modes"].append(row)
    for run in runs(task, steps, seeds):
        record["runs"].append(run)
        if options.output is not None:  # each time: they are long
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")
        print(
            f"seed {run['seed']}, {run['mode']:22} accuracy {run['accuracy']:.1%}, "
            f"{run['robust_accuracy']:.1%} under {REPORTED}",
            flush=True,
        )
    print(summary(record))
    if options.output is not None:
        print(f"written to {harness.relative(str(options.output.resolve()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
