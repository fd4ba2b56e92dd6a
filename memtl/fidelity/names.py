"""Short names of storage formats, and configurations as code to paste."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..storage import CenteredTopK, Dense, Format, Quantized, SignMean, TopK

DEFAULT = ("q8", "q4", "q3", "q2", "topk10", "topk3", "centered10", "centered3", "sign3")
NAMES = "q8, q4, q3, q2 (bits), topkN, centeredN, signN (N % kept: topk10, sign3), dense"
"""What :func:`parse` takes, for a message."""

_SPARSE = {"topk": TopK, "centered": CenteredTopK, "sign": SignMean}
_CHOICE = re.compile(r"(topk|centered|sign)(\d+(?:\.\d+)?)")


def parse(name: str) -> Format:
    """The format of that short name: ``q4``, ``topk10``, ``centered3``, ``sign3``, ``dense``.

    Raises:
        ValueError: no format is called that.
    """
    if name == "dense":
        return Dense()
    try:
        if quantized := re.fullmatch(r"q(\d+)", name):
            return Quantized(int(quantized[1]))
        if sparse := _CHOICE.fullmatch(name):
            return _SPARSE[sparse[1]](keep=float(sparse[2]) / 100)
    except ValueError as error:
        raise ValueError(f"format {name!r}: {error}") from None
    raise ValueError(f"unknown format {name!r}: known are {NAMES}")


def named(formats: Mapping[str, Format] | Sequence[str | Format]) -> dict[str, Format]:
    """Formats by what to call them, of a mapping, of short names or of formats.

    Raises:
        TypeError: something else is among them.
        ValueError: an unknown name, none at all, or a top-k that leaves its fraction open.
    """
    if isinstance(formats, str):
        raise TypeError(f"formats must be a sequence or mapping, got the string {formats!r}")
    if isinstance(formats, Mapping):
        result = dict(formats)
    else:
        result = {f if isinstance(f, str) else str(f): _format(f) for f in formats}
    if not result:
        raise ValueError("formats must have at least one format, got none")
    for name, format in result.items():
        if not isinstance(format, Format):
            raise TypeError(
                f"formats must be memtl.storage.Format or their short names, got {format!r}"
            )
        if getattr(format, "keep", 1) is None:
            raise ValueError(f"format {name!r} leaves `keep` open: give a fraction in (0, 1]")
    return result


def _format(format: Any) -> Any:
    return parse(format) if isinstance(format, str) else format


def code(value: Any) -> str:
    """A configuration or a format as an expression, given ``import memtl``: its bits, and what is
    not its class's default."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    module = "memtl.storage" if isinstance(value, Format) else "memtl"
    given = ", ".join(
        f"{field.name}={code(own)}"
        for field in dataclasses.fields(value)
        if (own := getattr(value, field.name)) != field.default or field.name == "bits"
    )
    return f"{module}.{type(value).__name__}({given})"
