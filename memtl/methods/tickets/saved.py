"""The file of a ticket: masks, on request the surviving weights, and a record that both answer to.

One safetensors file: ``mask.<name>`` uint8 [ceil(numel / 8)], ``weight.<name>`` [kept], and in its
metadata, under ``memtl.ticket``, a JSON record with shapes, counts and the sha256 of everything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import write_aside
from ...functional import count_bits
from .masks import check_mask, digest

VERSION = 1
KEY = "memtl.ticket"

Shape = tuple[int, ...]


def write(
    path: Path,
    about: dict[str, Any],
    layers: Mapping[str, tuple[Shape, int]],
    masks: Mapping[str, Tensor],
    values: Mapping[str, Tensor] | None,
) -> None:
    """Write a ticket; ``layers`` is of every weight the shape and the number of survivors."""
    from safetensors.torch import save_file

    tensors = {f"mask.{name}": bits.contiguous() for name, bits in masks.items()}
    tensors |= {f"weight.{name}": t.contiguous() for name, t in (values or {}).items()}
    record = {
        "version": VERSION,
        **about,
        "layers": {name: [list(shape), kept] for name, (shape, kept) in layers.items()},
        "weights": values is not None,
    }
    record["sha256"] = _digest(record, tensors)
    metadata = {KEY: json.dumps(record)}
    write_aside(path, lambda aside: save_file(tensors, str(aside), metadata))


def read(
    path: Path,
) -> tuple[dict[str, Any], dict[str, Shape], dict[str, Tensor], dict[str, Tensor] | None]:
    """The record, the shapes, the masks and the values, if any, of what :func:`write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, or of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if text is None:
        raise ValueError(f"{path} is no ticket: its metadata has no {KEY!r}")
    try:
        record = json.loads(text)
        version = record["version"]
        if version != VERSION:
            raise ValueError(f"version {version!r} is unknown, this memtl reads {VERSION}")
        layers = {name: (tuple(shape), kept) for name, (shape, kept) in record["layers"].items()}
        parts = ("mask", "weight") if record["weights"] else ("mask",)
        if odd := tensors.keys() ^ {f"{part}.{name}" for part in parts for name in layers}:
            raise ValueError(f"{sorted(odd)[0]!r} is missing or too much")
        for name, (shape, kept) in layers.items():
            bits = tensors[f"mask.{name}"]
            check_mask(name, bits, math.prod(shape))
            if (found := count_bits(bits)) != kept:
                raise ValueError(
                    f"the mask of {name} keeps {found} elements, not {kept} as it says"
                )
            if "weight" in parts and tuple(tensors[f"weight.{name}"].shape) != (kept,):
                size = list(tensors[f"weight.{name}"].shape)
                raise ValueError(f"the weights of {name} have to be [{kept}], got {size}")
        said = record.pop("sha256")
        if _digest(record, tensors) != said:
            raise ValueError(f"its content was altered: its sha256 is not {said}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged: {what}") from error
    return (
        record,
        {name: shape for name, (shape, _) in layers.items()},
        {name: tensors[f"mask.{name}"] for name in layers},
        {name: tensors[f"weight.{name}"] for name in layers} if record["weights"] else None,
    )


def _digest(record: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return digest(tensors, json.dumps(record, sort_keys=True))
