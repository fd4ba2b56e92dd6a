"""A table of strings that prints aligned and renders as HTML, and the numbers that go in it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from html import escape


def ratio(value: float | None, base: float | None) -> str:
    """``value / base`` to two digits, as ``0.084x``; a dash where either is missing or 0."""
    if not value or not base:
        return "-"
    quotient = value / base
    digits = next((n for n in range(4) if quotient * 10**n >= 9.95), 4)
    return f"{quotient:.{digits}f}x"


def mean_std(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and from two values on ± their (sample) standard deviation."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header: the first column is flush left, the others flush right.

    Raises:
        ValueError: a row is not as long as the header.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row must have {len(self.header)} cells like the header: {row}")

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        texts.insert(1, "-" * len(texts[0]))
        return "\n".join(text.rstrip() for text in texts)

    def html(self, caption: str) -> str:
        """A ``<table>``: cells escaped, the first one of each row its heading."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.header)
        body = "\n".join(
            f'<tr><th scope="row">{escape(first)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
            + "</tr>"
            for first, *rest in self.rows
        )
        return (
            f'<div class="scroll"><table>\n<caption>{escape(caption)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
        )
