"""Small pre-trained networks that ship with the package, so that demos need no download.

``vit_glyphs`` is a vision transformer, ``cnn_glyphs`` a MobileNetV2. Each one is a pair of files:
``NAME.safetensors`` holds the weights (float16; buffers as they are) and ``NAME.json`` says what
the architecture is, how the weights were made, and what their sha256 is. The file ``pretrain.py``
made them and can make them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

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


def build(architecture: dict[str, Any]) -> nn.Module:
    """Build an untrained network from what a record says of its architecture.

    Args:
        architecture: ``kind`` is ``"vit"`` (the rest are keyword arguments of
            ``timm.models.VisionTransformer``) or ``"mobilenet_v2"`` (``stem_stride``, ``stages``
            in timm's notation, a string each, and keyword arguments of
            ``timm.models.EfficientNet``, timm's class for that family).

    Raises:
        ValueError: If the kind is missing or unknown.
        ImportError: If timm is not installed.
    """
    options = dict(architecture)
    kind = options.pop("kind", None)
    if kind not in _BUILDERS:
        raise ValueError(f"unknown kind of architecture {kind!r}: known are {sorted(_BUILDERS)}")
    try:
        import timm.models  # noqa: F401
    except ImportError as error:
        raise ImportError("memtl.assets needs timm: pip install memtl[demo]") from error
    return _BUILDERS[kind](**options)


def _vit(**options: Any) -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(**options)


def _mobilenet_v2(stages: Sequence[str], stem_stride: int, **options: Any) -> nn.Module:
    from timm.models.efficientnet import EfficientNet, decode_arch_def

    blocks = decode_arch_def([[stage] for stage in stages])
    model = EfficientNet(blocks, act_layer=nn.ReLU6, fix_stem=True, **options)
    # timm's stem always has stride 2, which leaves too little of a 32x32 image; its padding of 1
    # is right for either stride.
    model.conv_stem.stride = (stem_stride, stem_stride)
    return model


_BUILDERS: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": _mobilenet_v2, "vit": _vit}


def load(
    name: str = "vit_glyphs",
    num_classes: int | None = None,
    directory: str | PathLike[str] = _HERE,
) -> nn.Module:
    """Return a pre-trained network, in float32 on the CPU, in training mode.

    It takes images ``[n, 1, 32, 32]`` normalised as those of :mod:`memtl.tasks` and returns logits
    ``[n, num_classes]``.

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
