"""How the table of models is shown: lines in a terminal, a document in Markdown."""

from collections.abc import Sequence
from typing import Any

from .check import (
    KEEP,
    KEEP_ALL,
    LEAST_COSINE,
    LEAST_RATIO,
    MOST_SLOPE,
    NEGLIGIBLE,
    Agreement,
)

MIB = 2**20
HEADER = (
    f"{'':32} {'MiB a sample':>15} {'':>6}  {'weights, keep 0.1':>17}  {'weights, keep 1':>17}\n"
    f"{'model':32} {'stock':>8} {'kept':>6} {'ratio':>6}  {'mean':>8} {'worst':>8}  "
    f"{'mean':>8} {'worst':>8}  {'s':>5}  ok"
)

COLUMNS = (
    "model",
    "family",
    "input",
    "stock",
    "kept",
    "ratio",
    f"weights, keep {KEEP:g}",
    f"weights, keep {KEEP_ALL:g}",
    "vectors",
    "left out",
    "keeps most",
    "ok",
)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many there are, and how many pass."""
    families = len({row["family"] for row in rows})
    passing = sum(not row["failures"] for row in rows)
    worst = sum(row["worst_weight_meets"] for row in rows)
    return (
        f"{len(rows)} models of {families} families: {passing} pass; in {worst} even the worst "
        "weight's cosine is above the bounds asked of the mean"
    )


def format_row(row: dict[str, Any]) -> str:
    """A row under :data:`HEADER`."""
    cells = [f"{row['name']:32}", *_bytes(row), " "]
    for key in ("pruned", "unpruned"):
        cells += [*_cosines(row[key]), " "]
    cells += [f"{row['seconds']:5.1f}", " ", _verdict(row)]
    return " ".join(cells)


def _verdict(row: dict[str, Any]) -> str:
    if not row["failures"]:
        return "ok"
    return "; ".join(row["failures"]) + (f" ({row['note']})" if row["note"] else "")


def _bytes(row: dict[str, Any]) -> tuple[str, str, str]:
    def mib(count: int | None, width: int) -> str:
        return f"{'-':>{width}}" if count is None else f"{count / row['batch'] / MIB:{width}.2f}"

    ratio = f"{row['ratio']:5.1f}x" if row["kept_bytes"] is not None else f"{'-':>6}"
    return mib(row["stock_bytes"], 8), mib(row["kept_bytes"], 6), ratio


def _cosines(gradients: dict[str, Any] | None) -> tuple[str, str]:
    if gradients is None:
        return f"{'-':>8}", f"{'-':>8}"
    weights = Agreement(**gradients["weights"])
    return f"{weights.mean_cosine:8.3f}", f"{weights.worst_cosine:8.3f}"


def markdown(record: dict[str, Any]) -> str:
    """The table as a document."""
    rows = record["rows"]
    lines = [
        f"""# Models

Written by `{record["command"]}`: memtl {record["memtl"]} at commit `{record["commit"][:12]}`, torch
{record["torch"]}, timm {record["timm"]}, transformers {record["transformers"]}; {record["cpu"]},
{record["threads"]} threads, seed {record["seed"]}. {summary(rows)}.

Every model is in training mode, its weights random (what starts at zero drawn again, so that every
parameter has a gradient), and is compared with itself before the conversion, on the same random
numbers. **Stock** and **kept** are the bytes saved for backward, MiB a sample, before and after
`memtl.apply(model, memtl.BackRazorConfig(keep={KEEP:g}))`; **keeps most** is the heaviest layer of
the converted model. The other columns are cosines of gradients with the exact ones, along one
random direction of the output: the mean, and in brackets the worst and whose it is. At keep
{KEEP_ALL:g} nothing is pruned, and what is left is the error of few bits. For vectors (biases,
norms) it is that at keep {KEEP:g}. **Left out** are gradients with less than {NEGLIGIBLE:.0e} of
the norm of the model's largest: rounding noise, as for a bias in front of a batch normalisation.

A model is **ok** when its forward and its buffers are the same, bit for bit; every gradient is
there and finite; it keeps at least {LEAST_RATIO:g} times fewer bytes; the mean cosine of its
weights is above {LEAST_COSINE[KEEP]:g} at keep {KEEP:g} and above {LEAST_COSINE[KEEP_ALL]:g} at
keep {KEEP_ALL:g}, where their length along the exact ones, which a cosine does not see, is right to
{MOST_SLOPE:.0%}; and `memtl.unconvert` gives back its classes, its forward and its gradients, bit
for bit.

Keeping the largest tenth of numbers that are normally distributed gives a cosine of 0.66; where a
few are large, it is higher."""
    ]
    for library in ("timm", "transformers"):
        chosen = [row for row in rows if row["library"] == library]
        if not chosen:
            continue
        lines += [
            "",
            f"## {library}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|",
            *(_markdown_row(row) for row in chosen),
        ]
    return "\n".join(lines) + "\n"


def _markdown_row(row: dict[str, Any]) -> str:
    stock, kept, ratio = (cell.strip() for cell in _bytes(row))
    cells = [f"`{row['name']}`", row["family"], f"{row['batch']} x {row['size']}"]
    cells += [stock, kept, ratio]
    for key in ("pruned", "unpruned"):
        mean, worst = (cell.strip() for cell in _cosines(row[key]))
        name = row[key] and row[key]["weights"]["worst"]
        cells.append("-" if row[key] is None else f"{mean} ({worst}, `{name}`)")
    if row["pruned"] is None:
        cells += ["-", "-"]
    else:
        weights, vectors = (Agreement(**row["pruned"][key]) for key in ("weights", "vectors"))
        cells.append(
            f"{vectors.mean_cosine:.3f} ({vectors.worst_cosine:.3f})" if vectors.compared else "-"
        )
        cells.append(str(weights.negligible + vectors.negligible))
    heaviest = row["remaining"][:1]
    cells.append(
        "".join(
            f"`{layer['layer']}` ({layer['kind']}, {layer['status']}): "
            f"{layer['bytes'] / row['kept_bytes']:.0%}"
            for layer in heaviest
        )
    )
    cells.append(_verdict(row).replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"
