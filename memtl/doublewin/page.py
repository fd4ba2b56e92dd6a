"""The grid as one page: double wins, accuracies against sparsity, what robustness brings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ..report import Page, Point, lines, origin
from ..report.table import Table
from .plan import DENSE, Cell, sparsity
from .results import METRICS, Results

QUALITY = {
    "autoattack": "Accuracy under AutoAttack, in %",
    "nll": "Negative log-likelihood, in nats",
    "ece": "Expected calibration error",
    "auc_noise": "ROC-AUC of confidence, against noise",
    "auc_letters": "ROC-AUC of confidence, against letters of an unseen font",
}
NOTES = """\
Networks are one architecture, pre-trained in several ways. A ticket says which weights survive: of
the convolutions and linear layers, not of norms, biases and the head. Level k prunes 1 - 0.8^k of
them. One-shot tickets prune the smallest of the pre-trained weights; iterative ones are drawn in
rounds: train, prune a fifth of the weights that are left, the smallest of the whole network, put
all weights back to where pre-training left them. Learned tickets keep the weights with the largest
scores, which are trained, the weights frozen. Iterative tickets are drawn on images of what the
networks were pre-trained on, those that say target, and learned ones, on the part of the data that
the transfer has; adversarially where they say so.

Under a ticket, or whole, the network gets a fresh head and is trained with AdamW without weight
decay, a linear warm-up over a tenth of the steps, then a cosine: standard transfer on images,
adversarial transfer on adversarial examples ({trained}). Standard accuracy is of the test images,
robust accuracy of those of which nothing on the way of {measured} is misclassified.

A ticket is a double win if its mean standard and robust accuracy, under both transfers, are not
more than {tolerance} below those of the whole network of the same pre-training.
"""


def page(results: Results, record: Mapping[str, Any]) -> Page:
    """The page; ``record`` is what the command writes as JSON.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plan = results.plan
    runs = "one run" if plan.seeds == 1 else f"{plan.seeds} runs"
    result = Page(
        "Double-win lottery tickets",
        f"Tickets of {', '.join(plan.pretrainings)} pre-training, transferred to "
        f"{record['data']['name']}; {runs} each.",
    )
    most = max(plan.percents)
    if best := results.best():
        result.tiles(
            {
                f"double-win sparsity, {name}, {most:g} % of the data": str(win)
                for name, (win, _) in best.items()
            }
        )
    if record["quick"]:
        result.paragraph("A quick run: too short for its figures to mean anything.")
    if record["missing"]:
        result.paragraph(f"Not finished, {record['missing']} runs are missing: - in the tables.")
    if plan.drawings:
        result.heading("Double wins" if results.double else "Tickets that match")
        result.table(
            results.wins(),
            f"The highest sparsity within {results.within} of the whole network "
            f"in standard and robust accuracy, under {' and '.join(plan.regimes)} transfer.",
        )
        for line in results.verdicts():
            result.paragraph(line)
    if len(plan.pretrainings) > 1 and plan.drawings:
        result.heading("Whether robust tickets transfer better")
        result.table(
            results.transfer(),
            f"Accuracies less those of {results.reference} tickets drawn alike, in points: means "
            "over levels of sparsity.",
        )
        for line in results.sentences():
            result.paragraph(line)
    for percent, regime in itertools.product(plan.percents, plan.regimes):
        result.heading(f"{regime.capitalize()} transfer, {percent:g} % of the data")
        for metric, name in METRICS.items():
            result.table(
                results.table(metric, regime, percent),
                f"{name.capitalize()} in % by sparsity: mean ± sample standard deviation.",
            )
            for drawing in plan.drawings:
                result.figure(
                    _curves(results, metric, drawing, regime, percent),
                    f"{name.capitalize()} of {drawing} tickets; at 0 % the whole network. Bars are "
                    "one standard deviation.",
                )
    if plan.drawings:
        result.heading(f"Margins, {most:g} % of the data")
        result.table(results.margins(most), "Accuracy less the whole network's, in points.")
    result.heading("More than accuracy")
    for (metric, text), regime in itertools.product(QUALITY.items(), plan.regimes):
        if results.has(metric):
            result.table(
                results.table(metric, regime, most),
                f"{text}: {regime} transfer, {most:g} % of the data.",
            )
    if record["domain_gap"]:
        result.table(
            gap_table(record["domain_gap"]),
            "Domain gap: the Frechet distance of what the classifier reads of target images from "
            "what it reads of source images; and, as what is none, between source images.",
        )
    result.heading("How this was done")
    texts = NOTES.format(
        trained=record["attacks"]["trained with"], measured=record["attacks"]["measured by"],
        tolerance=results.within,
    )  # fmt: skip
    for text in texts.strip().split("\n\n"):
        result.paragraph(text)
    if diverged := results.diverged():
        result.paragraph(f"{len(diverged)} runs diverged: runs.jsonl says which, and where.")
    networks = {f"Network, {name}": sha for name, sha in record["networks"].items()}
    result.definitions(origin(record) | networks | _trainings(record))
    return result


def gap_table(gaps: Mapping[str, Mapping[str, float]]) -> Table:
    """The domain gaps of ``record``."""
    rows = tuple((name, f"{g['target']:.1f}", f"{g['source']:.1f}") for name, g in gaps.items())
    return Table(("pre-training", "target to source", "source to source"), rows)


def _curves(results: Results, metric: str, drawing: str, regime: str, percent: float) -> str:
    series = {}
    for pretraining in results.plan.pretrainings:
        places = [(DENSE, 0), *((drawing, level) for level in results.plan.levels)]
        found = [
            Point(pretraining, 100 * sparsity(level), tuple(100 * value for value in values))
            for name, level in places
            if (
                values := results.values(metric, Cell(pretraining, name, level, regime, percent, 0))
            )
        ]
        if found:
            series[pretraining] = found
    return lines(
        series,
        title=f"{METRICS[metric]}, {drawing}, {regime} transfer, {percent:g} % of the data",
        x_label="sparsity, %",
        y_label=f"{METRICS[metric]}, %",
    )


def _trainings(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{regime.capitalize()} transfer, {percent}": f"{s['steps']} steps of {s['batch_size']}, "
        f"learning rate {s['learning_rate']:g}"
        for regime, found in record["settings"].items()
        for percent, s in found.items()
    }
