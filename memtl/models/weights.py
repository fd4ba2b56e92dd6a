"""State dicts from files: what is in them, and whether it is the network's."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Normalisation = dict[str, tuple[float, ...]]
"""``mean`` and ``std`` of a network's images."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], Normalisation]:
    """The weights in a file, by their names in the network; mean and deviation of the images, if
    the file has them. One that ends in ``.safetensors`` is read as that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as weights alone, or holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return _network(_read(path), path)


def put_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    origin: str,
    fresh: Collection[str] = (),
) -> tuple[str, ...]:
    """Load ``weights`` into ``model``, all of them and into all of it.

    Args:
        origin: what an error says of the weights: "FILE does not hold the weights of NAME".
        fresh: names of tensors that stay as they are in ``model``, all of them, where the weights
            have one of another shape or lack it.

    Returns:
        Those of ``fresh`` that stayed.

    Raises:
        ValueError: keys are missing, unexpected or of another shape, which the message names.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    there = {name: tensor.shape for name, tensor in weights.items()}
    kept = tuple(sorted(fresh)) if any(wanted[n] != there.get(n) for n in fresh) else ()
    wanted, there = ({n: s for n, s in d.items() if n not in kept} for d in (wanted, there))
    wrong = {
        # Files from before torch 1.0 do not have the counters, which nothing here reads.
        "missing": [n for n in wanted.keys() - there if not n.endswith("num_batches_tracked")],
        "unexpected": [*(there.keys() - wanted)],
        "of another shape": [n for n in wanted.keys() & there if wanted[n] != there[n]],
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {few(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{origin}: {found}")
    own = model.state_dict()
    model.load_state_dict({n: own[n] if n in kept else weights.get(n, own[n]) for n in own})
    return kept


def few(names: Sequence[str]) -> str:
    """The first three of them, sorted, and how many more."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(path: Path) -> Any:
    """What is in the file: tensors, and what holds them."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds objects beside its weights, which can run any code when "
            "they are read. If you trust it, convert it once, where dill is installed: "
            'import dill, torch; c = torch.load(PATH, "cpu", dill, weights_only=False); '
            'torch.save({"model": c["model"]}, NEW)'
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _network(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]]]:
    """The network's own weights; mean and deviation of the images, if the file has them."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not (
        isinstance(content, Mapping)
        and content
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise ValueError(f"{path} holds no state dict: no tensors by name")
    weights = {name.replace("_orig_mod.", ""): x for name, x in content.items()}  # torch.compile's
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): x for name, x in weights.items()}
    if not any(name.startswith("model.") for name in weights):
        return weights, {}
    normalisation = {
        kind: tuple(weights.pop(f"normalizer.new_{kind}").flatten().tolist())
        for kind in ("mean", "std")
        if f"normalizer.new_{kind}" in weights
    }
    return {
        name.removeprefix("model."): x
        for name, x in weights.items()
        if not name.startswith("attacker.")
    }, normalisation
