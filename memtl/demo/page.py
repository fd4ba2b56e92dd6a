"""The comparison as a page: table, plots, and how everything was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..report import Page, Point, curves, origin, tradeoff
from .experiments import FULL, PARTS, Experiment
from .results import KIB, Result, table

NOTES = """\
Saved bytes are counted on one training batch, from the input to the loss: every storage that
autograd holds between forward and backward, once; parameters are left out. Checkpointing holds the
inputs of the blocks; while backward runs it holds one block's recomputed activations besides, which
shows in the peak only.

The peak is what one forward and backward need beyond the model and its gradients: from the resident
set on a CPU, from torch's allocator on CUDA.

Times are medians of {rounds} whole steps (forward, loss, backward, AdamW), the methods taking
turns.

Every method starts from the same weights and sees the same batches in the same order. Learning
rates were chosen on the validation split, among as many candidates for each kind of method; those
that train the whole network take that of full fine-tuning. Scores are of the test split, after the
last step.
"""
"""What a reader must know to read the figures rightly."""


def page(
    results: Sequence[Result], experiment: Experiment, score: str, record: dict[str, Any]
) -> Page:
    """The page, of figures and of what ``record`` says of where they are from."""
    seeds, steps = record["seeds"], record["settings"]["steps"]
    base = next(r for r in results if r.name == FULL)
    others = {FULL, "full + checkpointing", *(method.name for method in PARTS)}
    lightest = min((r for r in results if r.name not in others), key=lambda r: r.saved_bytes)
    gap = statistics.fmean(lightest.test_score) - statistics.fmean(base.test_score)
    slower = lightest.seconds_per_step / base.seconds_per_step
    millions = record["model"]["parameters"] / 1e6
    runs = "one run" if len(seeds) == 1 else f"{len(seeds)} runs"
    pruned = ", under a ticket that of a pruned network" if experiment.ticket else ""
    result = Page(
        "Fine-tuning, keeping less",
        f"{experiment.network} {experiment.goal} ({millions:.1f} million parameters). The forward "
        f"pass is exact in every method{pruned}; what differs is what is trained, and what is kept "
        "in memory for backward.",
    )
    pair = f"{lightest.name} against {FULL}"
    result.tiles(
        {
            f"less kept for backward, {pair}": f"{base.saved_bytes / lightest.saved_bytes:.1f}x",
            f"points of test {score}, {pair}": f"{100 * gap:+.1f}",
            f"the time of a step, {pair}": f"{slower:.2f}x",
        }
    )
    result.heading("Comparison")
    deviation = " ± standard deviation" if len(seeds) > 1 else ""
    result.table(
        table(results, score),
        f"Test {score}: mean{deviation} over {runs} of {steps} steps, batch "
        f"{experiment.batch_size}. Ratios are to {FULL}.",
    )
    capital = score[0].upper() + score[1:]
    result.heading(f"{capital} against memory")
    points = [
        Point(r.name, r.saved_bytes_per_sample / KIB, tuple(100 * a for a in r.test_score))
        for r in results
    ]
    result.figure(
        tradeoff(
            points,
            title=f"{capital} against memory",
            x_label="saved for backward, KiB a sample",
            y_label=f"test {score}, %",
        ),
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
    notes = NOTES.format(rounds=record["rounds"]) + experiment.notes
    for text in notes.strip().split("\n\n"):
        result.paragraph(text)
    result.definitions(
        origin(record)
        | {
            "Seeds": ", ".join(map(str, seeds)),
            "Learning rates": "; ".join(f"{r.name} {r.learning_rate:g}" for r in results),
        }
    )
    return result
