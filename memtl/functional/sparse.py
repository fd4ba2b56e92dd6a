"""When a linear layer over the surviving weights alone is faster than the dense one."""

from __future__ import annotations

import torch


def sparse_pays(
    density: float,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> bool:
    """Whether :func:`memtl.functional.linear` should be given its ``mask``, or a masked weight.

    Args:
        density: the fraction of the weight's elements that survive, in [0, 1].
        tokens: rows of the input.
        dtype: of the product.
        device: where it is computed.

    Raises:
        ValueError: ``density`` is not in [0, 1], or ``tokens`` is negative.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    if tokens < 0:
        raise ValueError(f"tokens must be 0 or more, got {tokens}")
    if torch.device(device).type != "cpu" or dtype != torch.float32:
        return False
    return density <= 0.3
