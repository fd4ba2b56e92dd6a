"""Checkpoints of robustly pre-trained networks, from a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .named import timm_model


def load_robust(path: str | PathLike[str], arch: str = "resnet50", **options: Any) -> Any:
    """A network of timm's with the weights of a checkpoint, in the mode of a fresh one: training.

    Files are those of MadryLab's ``robustness``, as in the robust ImageNet models of Salman et al.
    (NeurIPS 2020; ``madrylab/robust-imagenet-models`` on Hugging Face), which hold the network
    behind its normalisation and beside an attacker's copy of it; and state dicts of timm and
    torchvision, whose ResNets have the same keys, alone or as ``state_dict`` or ``model``, by
    ``torch.save`` or as safetensors, with or without the ``module.`` of parallel training.

    The network takes normalised images. Its ``pretrained_cfg`` has the ``mean`` and ``std`` of the
    checkpoint, where that has them, and timm's for ``arch`` otherwise; with
    ``Normalized(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])`` it takes images
    in 0..1, as attacks want.

    Args:
        path: the file; one that ends in ``.safetensors`` is read as that.
        arch: a name of :func:`memtl.models.timm_model`.
        options: others of ``timm.create_model``, such as ``num_classes`` where it is not 1000.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as weights alone, holds no state dict, or one that is not that
            of ``arch``: the message names keys that are missing, unexpected or of another shape.
            Of files that ``robustness`` pickled with more than weights it says how to convert them.
        ImportError: timm is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    weights, normalisation = _network(_read(path), path)
    model = timm_model(arch, **options)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = {
        # Files from before torch 1.0 do not have the counters, which nothing here reads.
        "missing": [n for n in wanted.keys() - weights if not n.endswith("num_batches_tracked")],
        "unexpected": [*(weights.keys() - wanted)],
        "of another shape": [n for n in wanted.keys() & weights if wanted[n] != weights[n].shape],
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {_few(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{path} does not hold the weights of {arch}: {found}")
    model.load_state_dict(weights)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **normalisation}
    return model


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
    weights = dict(content)
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


def _few(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
