"""What measure() found as one page: the recommendation, tables and plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..report import Page, Point, curves, origin, tradeoff
from .recommend import KIB
from .result import Result
from .rows import Row

LEAST = 1e-7
"""What is closer to the exact gradient than this is drawn here: zero has no logarithm."""

ERROR = "1 - mean cosine"
COLUMNS = """\
Bytes are those saved for backward, a sample, parameters left out; bits are those of an element that
is kept in a storage format. Then, of the gradients of weights, and of vectors (biases, norms): mean
and worst cosine with the exact ones, and the mean of |g - e| / |e| for g computed and e exact. The
input is that of the first layer that trains: the gradient that reaches it has come all the way.
Short is how many parameters' gradients have a cosine below the threshold."""


def page(result: Result, model: str, record: Mapping[str, Any]) -> Page:
    """The page; ``record`` says where the figures come from.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = Page(
        f"How close gradients are: {model}",
        "The gradients computed from what is kept between forward and backward, against the exact "
        f"ones: {result.parameters / 1e6:.1f} million parameters, a batch of {result.batch_size}.",
    )
    _recommendation(found, result)
    if result.configurations:
        found.heading("By configuration")
        found.table(result.by_configuration(), f"Everything converted. {COLUMNS}")
        _scatter(found, result.configurations, "Configurations", by_bits=False)
    if result.roles:
        found.heading("By role and format")
        found.table(result.by_role(), "One role converted, the others stock. Columns as above.")
        for role in dict.fromkeys(row.role for row in result.roles):
            rows = [row for row in result.roles if row.role == role]
            _scatter(found, rows, f"Formats for the role {role}", by_bits=True)
    if result.deep():
        _depths(found, result)
    found.heading("How this was measured")
    for note in (*result.notes(), *result.errors()):
        found.paragraph(note)
    found.definitions(origin(record) | {"Seed": result.seed})
    return found


def _recommendation(found: Page, result: Result) -> None:
    best = result.recommended
    if best is not None:
        found.tiles(
            {
                f"less kept for backward by {best.label}": f"{result.stock_bytes / best.bytes:.1f}x"
                if best.bytes
                else "all",
                f"worst cosine, {best.worst.worst}": f"{best.worst.worst_cosine:.3f}",
                "cosine of the gradient at the first layer's input": f"{best.input_cosine:.3f}",
            }
        )
    found.heading("Recommended")
    found.paragraph(f"Thresholds: {result.thresholds}.")
    for choice in reversed(result.choices):  # everything first
        if choice.row is not None:
            found.code(f"{choice.role or 'everything'}: {choice.row.code}")
        found.paragraph(choice.reason if choice.row else f"{choice.role}: {choice.reason}")


def _scatter(found: Page, rows: Iterable[Row], title: str, *, by_bits: bool) -> None:
    """Error against cost. Of a single role the cost is bits: bytes are mostly the other roles'."""
    points = []
    for row in rows:
        x, error = (row.bits if by_bits else row.bytes / KIB), 1 - row.mean_cosine
        if x and math.isfinite(x) and math.isfinite(error):
            points.append(Point(row.label, x, (max(error, LEAST),)))
    if points:
        x_label = "bits an element" if by_bits else "saved for backward, KiB a sample"
        svg = tradeoff(points, title=title, x_label=x_label, y_label=ERROR, log_y=True)
        found.figure(svg, f"{title}: down and to the left is better.")


def _depths(found: Page, result: Result) -> None:
    found.heading("By depth")
    series = {
        row.label: [max(1 - c, LEAST) if math.isfinite(c) else 1.0 for c in row.depths.values()]
        for row in result.deep()
    }
    found.figure(
        curves(
            series,
            title="Error by depth",
            x_label="layers from the output",
            y_label="1 - cosine",
            weight=0.0,
        ),
        "How far the gradient that reaches each layer's input is from the exact one.",
    )
    found.table(result.by_depth(), "Cosine of the gradient that reaches each layer's input.")
