"""Small pre-trained networks that ship with the package, so that demos need no download.

Each one is a pair of files: ``NAME.safetensors`` holds the weights (float16) and ``NAME.json``
says what the architecture is, how the weights were made, and what their sha256 is. The file
``pretrain_vit.py`` made ``vit_glyphs`` and can make it again.
"""

from __future__ import annotations

import hashlib
import json
from os import PathLike
from pathlib import Path

from torch import nn

__all__ = ["load", "metadata", "names"]

_HERE = Path(__file__).parent


def names(directory: str | PathLike[str] = _HERE) -> list[str]:
    """Names that :func:`load` knows in ``directory`` (default: those of the package), sorted."""
    return sorted(path.stem for path in Path(directory).glob("*.json"))


def metadata(name: str = "vit_glyphs", directory: str | PathLike[str] = _HERE) -> dict:
    """Return what is recorded about a network: architecture, origin, accuracy, sha256.

    Args:
        name: One of :func:`names`.
        directory: Where the files are.

    Raises:
        ValueError: If ``name`` is unknown, or its JSON file is damaged.
    """
    if name not in names(directory):
        raise ValueError(f"unknown network {name!r}: {directory} has {names(directory)}")
    path = Path(directory, f"{name}.json")
    try:
        record = json.loads(path.read_bytes())
        record["architecture"], record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return record


def build(architecture: dict) -> nn.Module:
    """Build an untrained ``timm.models.VisionTransformer`` from its keyword arguments.

    Raises:
        ImportError: If timm is not installed.
    """
    try:
        from timm.models import VisionTransformer
    except ImportError as error:
        raise ImportError("memtl.assets needs timm: pip install memtl[demo]") from error
    return VisionTransformer(**architecture)


def load(
    name: str = "vit_glyphs",
    num_classes: int | None = None,
    directory: str | PathLike[str] = _HERE,
) -> nn.Module:
    """Return a pre-trained network, in float32 on the CPU, in training mode.

    ``vit_glyphs`` takes images ``[n, 1, 32, 32]`` normalised as those of :mod:`memtl.tasks` and
    returns logits ``[n, num_classes]``.

    Args:
        name: One of :func:`names`.
        num_classes: Replace the head by a fresh one of so many classes; ``None`` keeps the head
            of the source task.
        directory: Where the files are; default, those that ship with the package.

    Raises:
        TypeError: If ``num_classes`` is neither ``None`` nor an int.
        ValueError: If ``name`` is unknown, ``num_classes`` less than 1, or a file damaged,
            truncated or altered.
        FileNotFoundError: If the weights of a known name are missing.
        ImportError: If timm or safetensors is not installed.
    """
    if num_classes is not None:
        if not isinstance(num_classes, int) or isinstance(num_classes, bool):
            raise TypeError(f"num_classes must be an int, got {type(num_classes).__name__}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("memtl.assets needs safetensors: pip install memtl[demo]") from error

    record = metadata(name, directory)
    path = Path(directory, f"{name}.safetensors")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != record["sha256"]:
        raise ValueError(
            f"{path} is damaged, truncated or altered: its {len(content)} bytes have the sha256 "
            f"{found}, but {name}.json records {record['sha256']}"
        )
    model = build(record["architecture"])
    try:
        model.load_state_dict(safetensors.torch.load(content))  # copies float16 into float32
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {error}") from error
    if num_classes is not None:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model
