"""From a name to data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from torch import nn

from ..networks import Wants
from ..networks import wants as wants_of
from . import folder, hub, shipped, vision
from .found import Found
from .samples import Data, Images, Samples, Texts
from .splitting import stratified
from .transform import Transform

NAMES = (
    f"{', '.join(shipped.NAMES)} (shipped with memtl or with what it needs), a folder of images "
    "with a subfolder for each class (perhaps in train/, val/, test/), torchvision:CIFAR10, or "
    "datasets:NAME or datasets:PATH (Hugging Face's; a folder or file of parquet, csv, jsonl); "
    "options behind a '?': datasets:reviews.csv?text=body&label=stars"
)
"""What :func:`open_data` takes, for a command's help."""

TOKENS = 128
"""Tokens of a text, where nobody asks for another number."""

OF_IMAGES = {"min_scale": float, "flip": float}
SOURCES: dict[str, tuple[Callable[..., Found], dict[str, Any]]] = {
    "torchvision:": (vision.read, {"download": bool}),
    "datasets:": (hub.read, {"config": str, "image": str, "text": str, "label": str}),
    "": (folder.read, {}),
}
"""What a name begins with -> who reads it, and the options that are its own, with their types."""


def open_data(
    name: str,
    *,
    model: nn.Module | str | None = None,
    size: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    root: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Data:
    """The data of that name, as ``model`` takes it. Nothing is decoded before it is asked for.

    Args:
        name: as :data:`NAMES` says; ``?key=value&...`` behind it are options too.
        model: the network, or its name: what :func:`memtl.runs.networks.wants` says of it is how
            images are resized and normalised, and whose tokens texts become. None: images as most
            networks for ImageNet take them.
        size: height and width of images, in pixels; None for the network's own.
        tokens: of a text, with the special ones; what is beyond is cut off.
        seed: of the part that is kept for validation, where the data has none.
        val_fraction: how large that is, of every class.
        root: the folder that paths begin in, and where data that goes by a name is, or is fetched
            to: of torchvision ("data"), of the hub its cache.
        options: of images ``min_scale`` and ``flip``, how they are varied in training
            (:class:`memtl.runs.data.transform.Transform`); of torchvision ``download``, whether
            what is missing is fetched; of ``datasets`` the columns ``image``, ``text`` (two of
            them, with a comma, are a pair) and ``label``, and ``config``, which of several
            data sets of that name.

    Raises:
        TypeError: an option has a wrong type.
        ValueError: there is no such option, or it does not belong to this data; the data is not
            for this network, or contradicts itself: the message says where.
        OSError: there is no such data, or it cannot be had.
        ImportError: a library is missing: the message says which.
    """
    name, behind = _options_behind(name)
    if twice := sorted(behind.keys() & options.keys()):
        raise ValueError(f"{twice[0]} is given twice: behind the name of the data, and beside it")
    options = {**behind, **options}
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, (int, float)):
        raise TypeError(f"val_fraction must be a number, got {val_fraction!r}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be in (0, 1), got {val_fraction}")
    for what, number in (("size", size), ("tokens", tokens)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise TypeError(f"{what} must be an int or None, got {number!r}")
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")
    wants = None if model is None else wants_of(model, size)
    if name in shipped.NAMES:
        _check(options, {}, name)
        found: Found | None = None
        kind = shipped.NAMES[name]
    else:
        prefix = next(p for p in SOURCES if name.startswith(p))
        read, own = SOURCES[prefix]
        options = _check(options, own | OF_IMAGES, name)
        given = {key: value for key, value in options.items() if key in own}
        if prefix == "datasets:":
            given["kind"] = wants and wants.kind
        found = read(name.removeprefix(prefix), None if root is None else Path(root), **given)
        kind = found.kind
    wants = _as_wanted(name, kind, wants, size, tokens, options)
    if found is None:
        return shipped.read(name, wants, tokens or TOKENS)
    return _data(found, wants, tokens or TOKENS, options, val_fraction, seed)


def _options_behind(name: str) -> tuple[str, dict[str, str]]:
    if not isinstance(name, str):
        raise TypeError(f"the name of the data must be a string, got {name!r}")
    name, mark, text = name.partition("?")
    if not mark:
        return name, {}
    pairs = parse_qsl(text, keep_blank_values=True)
    if not pairs or len(pairs) != text.count("&") + 1:
        raise ValueError(f"behind the '?' there must be key=value&key=value, got {text!r}")
    return name, dict(pairs)


def _check(options: dict[str, Any], known: dict[str, Any], name: str) -> dict[str, Any]:
    """The options in their types; those behind a name are strings."""
    checked = {}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f": do you mean {near[0]}?" if near else ""
            there = f"there are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{key} is no option of {name} ({there}){hint}")
        kind = known[key]
        if kind is bool and isinstance(value, str):
            if value.lower() not in ("true", "false"):
                raise ValueError(f"{key} must be true or false, got {value!r}")
            value = value.lower() == "true"
        elif kind is float and isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{key} must be a number, got {value!r}") from None
        elif kind is not float and not isinstance(value, kind):  # of numbers Transform says more
            raise TypeError(f"{key} must be a {kind.__name__}, got {value!r}")
        checked[key] = value
    return checked


def _as_wanted(
    name: str,
    kind: str,
    wants: Wants | None,
    size: int | None,
    tokens: int | None,
    options: dict[str, Any],
) -> Wants:
    """What the network takes, if it takes this kind of data."""
    if wants is None:
        wants = Wants(size=size or Wants.size) if kind == "image" else shipped.default_texts()
    if wants.kind != kind:
        raise ValueError(f"{name} has {kind}s, but the network takes {wants.kind}s")
    if kind == "image" and tokens is not None:
        raise ValueError(f"tokens are of texts, but {name} has images")
    if kind == "text":
        if size is not None:
            raise ValueError(f"size is of images, but {name} has texts")
        if foreign := sorted(options.keys() & OF_IMAGES.keys()):
            raise ValueError(f"{foreign[0]} is of images, but {name} has texts")
        longest = wants.tokenizer.model_max_length
        if tokens is not None and tokens > longest:
            raise ValueError(f"the network takes at most {longest} tokens, not {tokens}")
    return wants


def _data(
    found: Found,
    wants: Wants,
    tokens: int,
    options: dict[str, Any],
    val_fraction: float,
    seed: int,
) -> Data:
    if found.kind == "image":
        transform = Transform(wants, **{k: v for k, v in options.items() if k in OF_IMAGES})
    else:
        tokens = min(tokens, wants.tokenizer.model_max_length)

    def samples(part: str, index: list[int] | None = None) -> Samples:
        reader, labels = found.parts[part]
        index = list(range(len(labels))) if index is None else index
        chosen = [labels[i] for i in index]
        if found.kind == "image":
            return Images(reader, index, chosen, transform)
        return Texts(reader, index, chosen, wants.tokenizer, tokens)

    if "val" in found.parts:
        train, val = samples("train"), samples("val")
    else:
        labels = found.parts["train"].labels
        parts = stratified(labels, found.classes, val_fraction, seed)
        train, val = (samples("train", index) for index in parts)
    test = samples("test") if "test" in found.parts else None
    return Data(train, val, test, found.classes, kind=found.kind)
