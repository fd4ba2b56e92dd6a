"""Saving what a method owns and nothing else: configurations as JSON, tensors as safetensors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...files import sha256_of, write_aside
from ...nn.report import plain_name
from ...nn.weights import compressed
from .applied import apply
from .config import config_from_dict
from .record import applied, unwrapped
from .transfer import Trained, owned

CONFIG = "memtl.json"
OURS = re.compile(r"weights-[0-9a-f]{12}\.safetensors")


def save(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write what was applied to ``model`` and what trains in it to ``directory``: ``memtl.json``
    and the file of weights that it names.

    Weights are the parameters that require a gradient, all that the methods made, and buffers (see
    :func:`memtl.methods.base.transfer.owned`), by their names in the model, without the prefixes of
    torch.compile and of parallel wrappers. A save that is interrupted leaves the save that was
    there before; what another save of memtl left in ``directory`` is deleted.

    Returns:
        The directory.

    Raises:
        ValueError: no method was applied to ``model``, or nothing in it trains.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save_file

    model = unwrapped(model)
    configs = applied(model)
    if not configs:
        raise ValueError(f"no method was applied to this {type(model).__name__}: memtl.apply first")
    tensors = {plain_name(n): t.cpu().contiguous().clone() for n, t in owned(model)}
    if not tensors:
        raise ValueError(f"nothing in this {type(model).__name__} trains: there is nothing to save")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    new = directory / "new.safetensors"
    digest = write_aside(new, lambda path: save_file(tensors, path))
    weights = directory / f"weights-{digest[:12]}.safetensors"
    os.replace(new, weights)
    record = {"methods": [c.to_dict() for c in configs], "weights": weights.name, "sha256": digest}
    text = json.dumps(record, indent=2) + "\n"
    write_aside(directory / CONFIG, lambda path: path.write_text(text))  # from here on it counts
    for old in directory.glob("weights-*.safetensors"):
        if OURS.fullmatch(old.name) and old != weights:
            old.unlink()
    return directory


def load(model: nn.Module, directory: str | os.PathLike[str]) -> Trained:
    """Apply to ``model`` what was applied to the saved one, and give it the saved weights, in the
    dtypes that it has. Where the weights do not fit, the methods stay applied.

    Args:
        model: the pre-trained model, as it was before any method was applied; or one to which
            exactly the saved methods were. LoRA of peft has to be there already if it was.
        directory: what :func:`save` wrote.

    Returns:
        What trains in the model now.

    Raises:
        FileNotFoundError: there is no save in ``directory``, or its weights are missing.
        ValueError: the files are damaged, or are not those of one save; other methods were applied
            to ``model``; an entry is missing, unknown, or of another shape than the model's, which
            is then named.
        ImportError: safetensors is not installed.
    """
    record, tensors = _read(Path(directory))
    model = unwrapped(model)
    configs = tuple(map(config_from_dict, record["methods"]))
    if not applied(model):
        for config in configs:
            apply(model, config)
    elif applied(model) != configs:
        names = [[c.method for c in either] for either in (applied(model), configs)]
        raise ValueError(
            f"other methods, or with other options, were applied to this model ({names[0]}) than "
            f"to the saved one ({names[1]}): load into the pre-trained model"
        )
    own = {plain_name(name): tensor for name, tensor in owned(model)}
    if missing := sorted(set(own) - set(tensors)):
        raise ValueError(f"{directory} lacks {missing[0]!r} ({len(missing)} missing in all)")
    if extra := sorted(set(tensors) - set(own)):
        raise ValueError(
            f"{directory} has {extra[0]!r}, which does not train in this {type(model).__name__} "
            f"({len(extra)} such entries in all)"
        )
    for name, tensor in tensors.items():
        wanted = own[name]
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            raise ValueError(
                f"{directory}: {name!r} is {list(tensor.shape)} {tensor.dtype}, but this "
                f"{type(model).__name__} needs {list(wanted.shape)} {wanted.dtype}"
            )
    coded = {plain_name(name): layer for name, layer in compressed(model).items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
            if name in coded:  # a copy was decoded for us
                coded[name].memtl_encode(own[name])
    return Trained.of(model)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / CONFIG
    try:
        record = json.loads(path.read_text())
        weights, digest, _ = directory / record["weights"], record["sha256"], record["methods"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} holds no save: it has no {CONFIG}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not weights.is_file():
        raise FileNotFoundError(f"{path} names {weights.name}, which is missing")
    if sha256_of(weights) != digest:
        raise ValueError(f"{weights} is damaged, truncated or altered: its sha256 is not {digest}")
    try:
        return record, load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from error
