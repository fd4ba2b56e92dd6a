"""The comparison in a terminal, and as a document with plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memtl.report import Point, Table, mean_std, ratio, tradeoff

from .entries import CHECKPOINTING, FULL, RATES

MIB, KIB = 2**20, 2**10
RAZORS = ("Back Razor 0.1", "Back Razor 0.03", "Back Razor 0.1, small")
TITLES = {"vit": "Vision transformer", "cnn": "MobileNetV2", "bert": "BERT"}
GOALS = {
    "digits": "pre-trained on printed characters, learns handwritten digits",
    "kind": "pre-trained by masked words, learns what kind of object a docstring describes",
}


def table(record: Mapping[str, Any]) -> Table:
    """Rows as they were measured, costs beside their ratio to full fine-tuning."""
    rows = record["rows"]
    base = next(row for row in rows if row["entry"] == FULL)

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        own = row["trained_as"] == row["entry"]
        peak, steps, seconds = (
            row[k] for k in ("peak_bytes", "steps_to_target", "seconds_to_target")
        )
        return (
            row["entry"],
            mean_std([100 * a for a in row["test"]]) if own else f"as {row['trained_as']}",
            f"{row['learning_rate']:g}",
            f"{row['trainable']:,}",
            f"{row['saved_bytes_per_sample'] / KIB:,.0f}",
            ratio(row["saved_bytes_per_sample"], base["saved_bytes_per_sample"]),
            "n/a" if peak is None else f"{peak / MIB:.1f}",
            f"{1000 * row['seconds_per_step']:.0f}",
            ratio(row["seconds_per_step"], base["seconds_per_step"]),
            "-" if steps is None else f"{steps:.0f}",
            "-" if seconds is None else f"{seconds:.1f}",
        )

    target = f"to {100 * record['target']:.0f} %"
    header = (
        "method", "test %", "rate", "trained", "saved KiB/sample", "ratio", "peak MiB", "ms/step",
        "ratio", f"steps {target}", f"s {target}",
    )  # fmt: skip
    return Table(header, tuple(map(cells, rows)))


def verdict(record: Mapping[str, Any]) -> str:
    """Back Razor beside checkpointing, in peak and in time, one line each."""
    rows = {row["entry"]: row for row in record["rows"]}
    other = rows[CHECKPOINTING]
    return "\n".join(
        f"{name} against {CHECKPOINTING}: peak {ratio(row['peak_bytes'], other['peak_bytes'])}, "
        f"step {ratio(row['seconds_per_step'], other['seconds_per_step'])}"
        for name, row in rows.items()
        if name in RAZORS
    )


def plots(record: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    name, rows = record["name"], record["rows"]
    title = TITLES[name]
    accuracy = [
        Point(
            row["entry"], row["saved_bytes_per_sample"] / KIB, tuple(100 * a for a in row["test"])
        )
        for row in rows
        if row["trained_as"] == row["entry"] or row["entry"] == CHECKPOINTING
    ]
    found = {
        f"comparison-{name}-accuracy.svg": tradeoff(
            accuracy,
            title=f"{title}: accuracy against what is kept",
            x_label="saved for backward, KiB a sample",
            y_label="test accuracy, %",
        )
    }
    times = [
        Point(row["entry"], row["peak_bytes"] / MIB, (1000 * row["seconds_per_step"],))
        for row in rows
        if row["peak_bytes"] is not None
    ]
    if times:
        found[f"comparison-{name}-time.svg"] = tradeoff(
            times,
            title=f"{title}: time against peak",
            x_label="peak of forward and backward, MiB",
            y_label="ms a step",
        )
    # Outside of a page nothing says what is behind the plot.
    return {
        file: svg.replace("<svg ", '<svg style="background:#fff" ', 1)
        for file, svg in found.items()
    }


NOTES = """\
Every method has the same budget: the same steps, batches and order of batches, and as many learning
rates to try ({whole}; of a part of the network {part}), of which the best on the validation split
with one seed is taken. Accuracy is that on the test split after the last step: mean and standard
deviation over {seeds} other seeds. A method whose gradients are another's, but for rounding, is
not trained again ("as ..."). Budgets are small: accuracies are those of short runs, not the best
that can be had.

*Saved* is what autograd holds between forward and backward, exactly, every storage once. *Peak* is
what forward and backward need beyond the model, its gradients and the optimizer's state: the growth
of the resident set, each method in a process of its own. A step is forward, loss, backward and
AdamW; times are medians of {rounds} steps, the methods taking turns in one process. The time to an
accuracy is the steps after which {watched} validation samples were first classified so well, looked
at every {every} steps, times the seconds of a step; evaluations are not counted. A dash: not every
seed got there.

*released Back Razor* is a baseline written from the paper: a threshold for each sample of each
tensor, bitmap and values, dense products in backward
(`benchmarks/training/released_back_razor.py`).
"""


def document(record: Mapping[str, Any], folder: Path) -> str:
    """Markdown; its plots are written to ``folder``, which is where it belongs."""
    first = record["backbones"][0]
    whole, part = (", ".join(f"{r:g}" for r in RATES[kind]) for kind in ("whole", "part"))
    seeds = len(first["rows"][0]["test"])
    notes = NOTES.format(
        whole=whole, part=part, seeds=seeds, rounds=first["rounds"], watched=first["watched"],
        every=first["every"],
    )  # fmt: skip
    machine = f"{record['cpu']}, {record['threads']} thread(s), torch {record['torch']}"
    parts = [
        "# Ways to fine-tune, compared",
        "Made by `make compare`; this one by",
        f"```\n{record['command']}\n```",
        f"on {machine}. Figures are in `benchmarks/results/`.",
        notes.strip(),
    ]
    for backbone in record["backbones"]:
        parts.append(f"## {TITLES[backbone['name']]}")
        sizes = ", ".join(f"{count} {name}" for name, count in backbone["sizes"].items())
        parts.append(
            f"Shipped with memtl, {GOALS[backbone['task']]} ({sizes}): {backbone['steps']} steps "
            f"of {backbone['batch_size']}. Times were measured under a load of "
            f"{backbone['load_average']:.1f}."
        )
        if backbone["batch_norms"]:
            parts.append(
                "Under checkpointing batches pass through batch norms twice, so running "
                "statistics are others; it is trained for itself here, with the learning rate of "
                "full fine-tuning."
            )
        parts += [_markdown(table(backbone)), verdict(backbone).replace("\n", "  \n")]
        for file, svg in plots(backbone).items():
            (folder / file).write_text(svg + "\n")
            parts.append(f"![{file.removesuffix('.svg')}]({file})")
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    rule = "|".join(["---", *["---:"] * (len(table.header) - 1)])
    lines = [" | ".join(table.header), rule, *(" | ".join(row) for row in table.rows)]
    return "\n".join(f"| {line} |" if line != rule else f"|{line}|" for line in lines)
