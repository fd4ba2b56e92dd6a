"""What the GPU path is to reach, beside what a run of gpu.py measured; and what the operators have
to move at least, from which a time follows that no card can go below.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]

FLOOR_HEADER = f"{'operator':24} {'':14} {'shape':>22} {'MB':>9} {'GFLOP':>9}"


def format_floor(row: Record) -> str:
    """A row of sizes under :data:`FLOOR_HEADER`."""
    flops = f"{row['flops'] / 1e9:9.1f}" if row["flops"] else " " * 9
    megabytes = f"{row['moved_bytes'] / 1e6:9.1f}"
    return f"{row['op']:24} {row['what']:14} {row['shape']:>22} {megabytes} {flops}".rstrip()


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that is asked for; ``measured`` finds it in a record, None where it is not in it."""

    what: str
    asked: float
    at_least: bool
    measured: Callable[[Record], float | None]


def _kernel(op: str, what: str, shape: str, field: str, baseline: str):
    """The field of an operator's row, of the first whose shape and baseline begin so."""

    def find(record: Record) -> float | None:
        rows = [
            row
            for row in record["rows"]
            if (row["op"], row["what"]) == (op, what)
            and row["shape"].startswith(shape)
            and row["baseline"].startswith(baseline)
        ]
        return rows[0][field] if rows else None

    return find


def _of_stock(model: str, mode: str, field: str):
    """A mode's figure over that of stock."""

    def find(record: Record) -> float | None:
        rows = {row["mode"]: row for row in record["training"] if row["model"] == model}
        if not {mode, "stock"} <= set(rows):
            return None
        if not (rows["stock"].get(field) and rows[mode].get(field)):
            return None
        return rows[mode][field] / rows["stock"][field]

    return find


RELEASED = "as released: kthvalue"
WIDE = "12608x3072"
VIT = "vit_base_patch16_224"
GOALS = (
    Goal(
        "topk_pack, 64 x 197 x 3072 in bfloat16, keep 0.1: share of the copy bandwidth",
        0.5,
        True,
        _kernel("topk_pack", "keep 0.1 int8", WIDE, "share_of_copy", RELEASED),
    ),
    Goal(
        "topk_pack against torch's kthvalue, mask, gather and bitmap",
        10,
        True,
        _kernel("topk_pack", "keep 0.1 int8", WIDE, "ratio", RELEASED),
    ),
    Goal(
        "query_attention with J, one query, against attention and its backward",
        3,
        True,
        _kernel("query_attention", "1 queries J", "64x12x1<-197x64", "ratio", "scaled_dot"),
    ),
    Goal(
        "threshold over the 85 M weights of 12 blocks, float32, against torch.kthvalue",
        50,
        True,
        _kernel("threshold_magnitude", "keep 0.5", "12 blocks", "ratio", "cat of magnitudes"),
    ),
    Goal(
        "ViT-B/16, batch 64: peak of a step with Back Razor, of stock's",
        0.25,
        False,
        _of_stock(VIT, "Back Razor 0.1", "peak_bytes"),
    ),
    Goal(
        "ViT-B/16, batch 64: time of a step with Back Razor, of stock's",
        1.10,
        False,
        _of_stock(VIT, "Back Razor 0.1", "seconds"),
    ),
    Goal(
        "the same, both recorded in a CUDA graph",
        1.10,
        False,
        _of_stock(VIT, "Back Razor 0.1", "graph_seconds"),
    ),
)


def compare(record: Record) -> list[Record]:
    """Every goal with what was measured, or None, and whether that is enough."""
    rows = []
    for goal in GOALS:
        measured = goal.measured(record)
        met = None
        if measured is not None:
            met = measured >= goal.asked if goal.at_least else measured <= goal.asked
        limit = "at least" if goal.at_least else "at most"
        asked = f"{limit} {goal.asked:g}"
        rows.append({"what": goal.what, "asked": asked, "measured": measured, "met": met})
    return rows


def format_goals(rows: list[Record]) -> str:
    """The rows of :func:`compare` as a table."""
    lines = [f"{'':80} {'asked':>14} {'measured':>12}"]
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        met = {None: "", True: "met", False: "MISSED"}[row["met"]]
        lines.append(f"{row['what']:80} {row['asked']:>14} {measured:>12} {met}".rstrip())
    return "\n".join(lines)
