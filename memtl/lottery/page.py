"""The experiment as one page: scores, verdicts, what transfers, the tickets, how it was done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import Page, Point, heatmap, lines, origin
from .facts import Facts
from .plan import DENSE
from .results import UNIVERSAL, Results, points
from .verdict import sparsest

MATCHING = """\
A ticket is matching if the mean of its scores is not below the mean of the dense runs less one of
their (sample) standard deviations: the bound. The sparsest matching ticket is the matching one of
the largest sparsity, whether or not those below it match.
"""
NOTES = """\
A ticket says which weights survive: of the linear layers of the encoder, pooler included; not of
embeddings, norms, biases and the head. Sparsity is of those weights, all of them together.

Iterative tickets are drawn in rounds: train on the source, prune another {amount:.0%} of the
original weights, the smallest of those that are left in the whole network, put all weights back to
where pre-training left them, and go on with the head as it is. One-shot tickets prune the smallest
of the pre-trained weights. Shuffled ones have as many survivors in each tensor as the task's
iterative ticket, but any; random ones as many in the whole network. Permuted weights are the
pre-trained ones, exchanged among layers, under the task's iterative ticket.

Under a ticket the pre-trained encoder gets a fresh head and is fine-tuned as the dense one is:
AdamW without weight decay, a linear warm-up over a tenth of the steps, then a cosine, gradients
clipped to a norm of {clip:g}. The seed decides the head, the order of the data and dropout, and
what shuffled, random and permuted schemes draw. Scores are of the test split, after the last step.
"""


def page(results: Results, facts: Facts, record: Mapping[str, Any]) -> Page:
    """The page; ``record`` is what the command writes as JSON.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plan, model = results.plan, record["model"]
    runs = "one run" if plan.seeds == 1 else f"{plan.seeds} runs"
    result = Page(
        "Lottery tickets of a pre-trained encoder",
        f"Subnetworks of {model['name']} ({model['parameters'] / 1e6:.1f} million parameters), "
        f"fine-tuned on {', '.join(plan.tasks)}; {runs} each.",
    )
    result.tiles(_tiles(results))
    if record["quick"]:
        result.paragraph("A quick run: too short for its scores to mean anything.")
    result.heading("Where tickets match")
    result.table(results.matching(), " ".join(MATCHING.split()))
    for task in plan.tasks:
        metric = record["tasks"][task]["metric"]
        result.heading(task)
        result.table(
            results.accuracies(task),
            f"Test {metric} in % by sparsity: mean ± sample standard deviation over {runs}.",
        )
        result.figure(
            _curves(results, task, metric),
            "Bars, and the band around the dense runs, are one standard deviation.",
        )
    result.heading("Transfer")
    result.table(
        results.transfer_table(),
        f"Tickets of {plan.transfer} % on every task: mean score less that of the dense runs, in "
        "points.",
    )
    result.figure(
        heatmap(
            {name: _scaled(row) for name, row in results.transfer().items()},
            title="Transfer",
            x_label="fine-tuned on",
            y_label="ticket of",
        ),
        "Points above (blue) and below (orange) the dense runs.",
    )
    for line in results.universal():
        result.paragraph(line)
    result.heading("The tickets")
    chance = _chance(plan.transfer / 100)
    result.table(
        facts.overlap_table(),
        f"Tickets of {plan.transfer} %: survivors of both relative to those of either; of two "
        f"random ones that is {chance:.1%}.",
    )
    result.table(facts.layer_table(), f"Tickets of {plan.transfer} %.")
    result.paragraph(facts.size())
    result.heading("How this was done")
    for text in NOTES.format(**record["constants"]).strip().split("\n\n"):
        result.paragraph(text)
    if diverged := [*results.diverged()]:
        result.paragraph(f"{len(diverged)} runs diverged: runs.jsonl says which, and where.")
    result.definitions(origin(record) | {"Model": model["sha256"]} | _recipes(record))
    return result


def _tiles(results: Results) -> dict[str, str]:
    found = {}
    for task in results.plan.tasks:
        verdicts = results.verdicts(task, *results.schemes(task)["iterative"])
        best = sparsest(verdicts)
        none = "none" if verdicts[0].decided else "not decided"
        found[f"sparsest matching ticket, {task}"] = none if best is None else f"{best.sparsity} %"
    if results.plan.universal:
        value = points(results.elsewhere()[UNIVERSAL])
        found[f"points to dense, universal ticket of {results.plan.transfer} %"] = value
    return found


def _curves(results: Results, task: str, metric: str) -> str:
    series = {}
    for name, scheme in results.schemes(task).items():
        found = [
            Point(name, v.sparsity, _hundredfold(v.ticket))
            for v in results.verdicts(task, *scheme)
            if v.ticket
        ]
        if found:
            series[name] = found
    dense = results.dense(task)
    return lines(
        series,
        title=f"{task}: {metric} against sparsity",
        x_label="sparsity, %",
        y_label=f"test {metric}, %",
        level=Point(DENSE, 0, _hundredfold(dense)) if dense else None,
    )


def _hundredfold(scores: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(100 * score for score in scores)


def _scaled(row: Mapping[str, float | None]) -> dict[str, float | None]:
    return {task: None if value is None else 100 * value for task, value in row.items()}


def _chance(sparsity: float) -> float:
    """Survivors in common of two random tickets, relative to those of either."""
    kept = 1 - sparsity
    return kept * kept / (1 - sparsity * sparsity)


def _recipes(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"Training, {name}": f"{r['steps']} steps of {r['batch_size']}, up to {r['max_length']} "
        f"tokens, learning rate {r['learning_rate']:g}"
        for name, r in record["recipes"].items()
    }
