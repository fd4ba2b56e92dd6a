"""When a linear layer over the surviving weights alone is faster than the dense one."""

from __future__ import annotations

import torch

# For products of a dtype: up to which density, how many tokens for each unit of it, and from how
# many tokens on. Below, all three products over the surviving weights were faster than torch's
# dense ones on an AMD EPYC with AVX-512, 768 -> 3072 features and back, on one thread: sorting the
# entries, at every call, has to pay. For bfloat16 torch uses its own instructions there.
_RULE = {
    torch.float32: (0.3, 400, 32),
    torch.float16: (0.3, 400, 32),
    torch.bfloat16: (0.1, 4000, 256),
}


def sparse_pays(
    density: float,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> bool:
    """Whether :func:`memtl.functional.linear` is faster with a ``mask`` than with a masked weight.

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
    if torch.device(device).type != "cpu" or dtype not in _RULE:
        return False
    most, each, least = _RULE[dtype]
    return tokens >= least and density <= min(most, tokens / each)
