"""Checkpoints of robustly pre-trained networks, from a file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from .named import timm_model
from .weights import put_weights, read_weights


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
    weights, normalisation = read_weights(path)
    model = timm_model(arch, **options)
    put_weights(model, weights, f"{path} does not hold the weights of {arch}")
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **normalisation}
    return model
