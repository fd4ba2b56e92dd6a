"""Masks of one bit an element: random ones, and what is checked of given ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...functional import magnitude_masks


def random_masks(sizes: list[int], kept: int, generator: torch.Generator) -> list[Tensor]:
    """Bits for tensors of so many elements, ``kept`` of them set in all, any with equal chances."""
    return magnitude_masks([torch.rand(n, generator=generator) for n in sizes], kept)


def check_mask(name: str, bits: Any, numel: int) -> None:
    """Raise unless ``bits`` are a mask of ``numel`` elements.

    Raises:
        ValueError: naming ``name``.
    """
    wanted = -(-numel // 8)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (wanted,):
        raise ValueError(
            f"the mask of {name} has to be uint8 [{wanted}] for {numel} elements, got "
            f"{bits.dtype} {list(bits.shape)}"
        )
    if numel % 8 and int(bits[-1]) >> numel % 8:
        raise ValueError(f"the mask of {name} has bits behind its last element")


def digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """The sha256 of names, dtypes, shapes and every bit of the tensors, and of ``about``."""
    total = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        t = tensors[name].detach()
        total.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        total.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
