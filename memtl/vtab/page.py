"""The comparison as one page: accuracies, what they cost, what was chosen, how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import Page, Point, Table, mean_std, origin, tradeoff
from ..tasks.vtab import DATASETS, OTHER
from ..training import Cost
from .method import Grid
from .protocol import Protocol
from .summary import Summary, percent

MIB, KIB = 2**20, 2**10

NOTES = """\
Of every dataset, the learning rate and the weight decay are those of the most accurate training on
the 800 images by the 200 validation images (of several, the smallest learning rate, then the
smallest weight decay). The model is then trained on all 1000 images, once for each seed, and tested
once, after its last epoch.

Training: Adam, weight decay as an L2 penalty on all but vectors, batches of {batch_size}, {epochs}
epochs, a linear warm-up over a tenth of them, then a cosine; the rate changes once an epoch, and is
that of the grid x {batch_size} / 256. (The published code warms up from 0, so its first epoch
changes nothing; here the warm-up's last epoch has the full rate.) Images are resized whole, without
augmentation.

Bytes saved for backward are counted on one training batch of {measured}, from what the model is
given to the loss: every storage that autograd holds between forward and backward, once; parameters
are left out. The peak is what one forward and backward need beyond the model and its gradients.
Times are medians of whole steps (forward, loss, backward, Adam), the methods taking turns. All are
of steps on images; where the network is frozen, the trainings themselves took what it gives,
computed once, but where that would have been larger than --cache-gib. Trainable parameters include
the last layer, of {measured}.
"""
"""What a reader must know to read the figures rightly."""


def costs_table(summary: Summary, costs: Mapping[str, Cost], batch: int) -> Table:
    """The mean accuracy of each method, with its deviation over the seeds, beside what it costs,
    measured on ``batch`` images."""
    return Table(
        (
            "method", f"{summary.overall.label}, %", "saved KiB/sample", "peak MiB",
            "trainable parameters", "s/step",
        ),
        tuple(
            (
                method,
                _over_seeds(summary, method),
                f"{cost.saved_bytes / batch / KIB:,.1f}",
                "n/a" if cost.peak_bytes is None else f"{cost.peak_bytes / MIB:,.0f}",
                f"{cost.trainable:,}",
                f"{cost.seconds_per_step:.4f}",
            )
            for method, cost in costs.items()
        ),
    )  # fmt: skip


def _over_seeds(summary: Summary, method: str) -> str:
    seeds = summary.by_seed(method)
    found = percent(summary.overall.values[method])
    return mean_std([100 * a for a in seeds]) if seeds else found


def page(
    summary: Summary,
    costs: Mapping[str, Cost],
    protocol: Protocol,
    grids: Mapping[str, Grid],
    record: Mapping[str, Any],
) -> Page:
    """The page; ``record`` is what the command writes as JSON.

    Raises:
        ImportError: matplotlib is not installed.
    """
    model, measured = record["model"], record["measured"]
    result = Page(
        "VTAB-1k" if any(d in DATASETS for d in summary.datasets) else "In the protocol of VTAB-1k",
        f"{model['name']} ({model['weights_from']}, {model['parameters'] / 1e6:.1f} million "
        f"parameters), fine-tuned on 1000 images of each task; {len(protocol.seeds)} "
        f"run{'s' if len(protocol.seeds) > 1 else ''} a method and task.",
    )
    result.tiles(
        {
            f"{method}, {summary.overall.label}": f"{percent(value)} %"
            for method, value in summary.overall.values.items()
            if value is not None
        }
    )
    result.heading("Accuracy")
    result.table(
        summary.table(),
        "Test accuracy, mean ± sample standard deviation over the seeds; below, means of means.",
    )
    result.heading("Accuracy and cost")
    result.table(
        costs_table(summary, costs, measured["batch"]),
        f"Measured on a batch of {measured['batch']} images of {measured['dataset']}.",
    )
    points = [
        Point(method, cost.saved_bytes / measured["batch"] / KIB, tuple(100 * a for a in by_seed))
        for method, cost in costs.items()
        if (by_seed := summary.by_seed(method))
    ]
    if len(points) > 1:
        result.figure(
            tradeoff(
                points,
                title="Accuracy against memory",
                x_label="saved for backward, KiB a sample",
                y_label=f"test accuracy, {summary.overall.label}, %",
            ),
            "Up and to the left is better. Bars: standard deviation, over the seeds, of that mean.",
        )
    result.heading("What was chosen")
    result.table(summary.chosen(), "Learning rates are those of the grid, for a batch of 256.")
    result.heading("How this was measured")
    notes = NOTES.format(
        batch_size=protocol.batch_size, epochs=protocol.epochs, measured=measured["dataset"]
    )
    for text in notes.strip().split("\n\n"):
        result.paragraph(text)
    for name, task in record["datasets"].items():
        if task["group"] == OTHER:
            result.paragraph(
                f"{name} is not of VTAB-1k; its {task['classes']} classes: {task['classes_from']}."
            )
    for name, reason in record["left_out"].items():
        result.paragraph(f"{name} was left out: {reason}")
    if diverged := sum(outcome.diverged for outcome in summary.outcomes.values()):
        result.paragraph(f"{diverged} trainings diverged: runs.jsonl says which, and where.")
    result.definitions(
        origin(record)
        | {
            "Weights": model["weights"],
            "Images": f"{record['size']} x {record['size']}, {record['normalisation']}",
            "Seeds": f"{', '.join(map(str, protocol.seeds))}; of the search {protocol.search_seed}",
            "Grids": "; ".join(f"{name}: {grid}" for name, grid in grids.items()),
        }
    )
    return result
