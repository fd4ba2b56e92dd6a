"""The coverage table of a conversion, with the bytes that every layer keeps once it is measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import memory

KIB = 2**10


@dataclasses.dataclass(frozen=True)
class Row:
    """One module in the coverage table: converted (``reason`` empty) or skipped, and why.

    ``saved``: the bytes it kept for backward when :meth:`Report.measure` ran, else None.
    """

    name: str
    kind: str
    role: str = ""
    kept: str = ""
    reason: str = ""
    saved: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did: the coverage table. ``print`` it."""

    rows: tuple[Row, ...]

    @property
    def converted(self) -> tuple[Row, ...]:
        """The rows of converted modules."""
        return tuple(row for row in self.rows if not row.reason)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """The rows of modules left as they were, each with its reason."""
        return tuple(row for row in self.rows if row.reason)

    def measure(self, model: nn.Module, *args: Any, **kwargs: Any) -> Report:
        """The same report, each row with the bytes that its module keeps for backward in
        ``model(*args, **kwargs)``; rows are added for other modules that keep something.

        A tensor counts for the innermost module that was running when it was first saved. Buffers
        (running statistics) and the state of the generator are left as they were.

        Raises:
            ValueError: ``model`` has no module of the report's names.
        """
        modules = {plain_name(name): module for name, module in model.named_modules()}
        if unknown := [row.name for row in self.rows if row.name not in modules]:
            raise ValueError(f"this is the report of another model: no {unknown[0]!r} in it")
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        with torch.random.fork_rng(), memory.SavedTensors(model) as saved:
            result = model(*args, **kwargs)
        del result
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        by_name = {plain_name(name): count for name, count in saved.by_layer.items()}
        rows = [dataclasses.replace(row, saved=by_name.pop(row.name, 0)) for row in self.rows]
        for name, count in by_name.items():
            kind = type(modules[name]).__name__ if name in modules else name
            reason = "its own code keeps this"
            rows.append(Row(name, kind, reason=reason, saved=count))
        return Report(tuple(rows))

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} modules, left {len(self.skipped)}"]
        lines += _table(
            ("layer", "kind", "role", "keeps"),
            [((r.name, r.kind, r.role, r.kept), r.saved) for r in self.converted],
        )
        if self.skipped:
            lines += ["", "left as they are"]
            lines += _table(
                ("layer", "kind", "reason"),
                [((r.name, r.kind, r.reason), r.saved) for r in self.skipped],
            )
        return "\n".join(lines)


def _table(
    header: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], int | None]]
) -> list[str]:
    """Rows that differ only in a layer's number become one: ``blocks.*.attn.qkv  x12``."""
    groups: dict[tuple[str, ...], list[tuple[str, int | None]]] = {}
    for (name, *rest), saved in rows:
        groups.setdefault((re.sub(r"\b\d+\b", "*", name), *rest), []).append((name, saved))
    measured = any(saved is not None for members in groups.values() for _, saved in members)
    body = []
    for (pattern, *rest), members in groups.items():
        name = members[0][0] or "(the model itself)"
        label = f"{pattern} x{len(members)}" if len(members) > 1 else name
        total = f"{sum(saved or 0 for _, saved in members) / KIB:,.1f}"
        body.append((label, *rest, *([total] if measured else [])))
    titles = (*header, *(["KiB kept"] if measured else []))
    widths = [max(len(row[i]) for row in [titles, *body]) for i in range(len(titles))]

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if measured:
            cells[-1] = row[-1].rjust(widths[-1])
        return "  " + "  ".join(cells).rstrip()

    return [line(row) for row in [titles, *body]]


def plain_name(name: str) -> str:
    """A module's name without what torch.compile and the wrappers of parallel training and of
    checkpointing put into it."""
    wrappers = "_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module"
    return re.sub(rf"(^|\.)({wrappers})(?=\.|$)", "", name).lstrip(".")
