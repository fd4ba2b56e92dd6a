"""The one call by which a Function keeps something for its backward.

Every Function goes through :func:`keep`, so that what is kept is decided, counted and, where a
tensor can be had from something already kept, answered in a single place. All of it passes through
``save_for_backward``: memory accounting, checkpointing and version checks see it.
"""

from __future__ import annotations

from torch import Tensor

from ..storage import Format, Packed, pack


def keep(ctx, *pairs: tuple[Tensor | None, Format], exact: tuple[Tensor | None, ...] = ()) -> None:
    """Save each tensor of ``pairs`` in its format (None: nothing), and those of ``exact`` as is."""
    saved = list(exact)
    specs = []
    for x, format in pairs:
        if x is None:
            specs.append(None)
            continue
        packed = pack(x, format)
        specs.append((format, x.shape, x.dtype, len(packed.tensors)))
        saved.extend(packed.tensors)
    ctx.specs = tuple(specs)
    ctx.num_exact = len(exact)
    ctx.save_for_backward(*saved)


def kept(ctx) -> tuple[list[Packed | None], tuple[Tensor | None, ...]]:
    """What :func:`keep` saved: the packed tensors in the order given, and the exact ones."""
    saved = ctx.saved_tensors
    start = ctx.num_exact
    packed: list[Packed | None] = []
    for spec in ctx.specs:
        if spec is None:
            packed.append(None)
            continue
        format, shape, dtype, count = spec
        packed.append(Packed(format, tuple(saved[start : start + count]), shape, dtype))
        start += count
    return packed, tuple(saved[: ctx.num_exact])
