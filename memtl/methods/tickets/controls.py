"""What a ticket is compared with: other weights under the same masks.

Other masks are :meth:`Ticket.shuffled` and the scheme "random"; weights as before any pre-training
are those of a new model.
"""

from __future__ import annotations

import torch
from torch import nn

from .scope import check_unmasked, inner_model, weights_in_scope


def permute_layers(model: nn.Module, seed: int, scope: tuple[str, ...] | None = None) -> int:
    """Exchange weights of the same shape among the layers of ``model``, in place: the numbers of
    pre-training, in the wrong places.

    Args:
        scope: as of :class:`memtl.TicketConfig`.

    Returns:
        How many weights are in another place now.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there are no weights in scope, none that has another one's shape, or ``model``
            has a ticket.
    """
    model = inner_model(model)
    check_unmasked(model)
    weights = [weight.parameter for weight in weights_in_scope(model, scope).values()]
    generator = torch.Generator().manual_seed(seed)
    alike: dict[tuple, list[nn.Parameter]] = {}
    for weight in weights:
        alike.setdefault((weight.shape, weight.dtype), []).append(weight)
    if all(len(group) == 1 for group in alike.values()):
        raise ValueError(f"no two weights in scope of this {type(model).__name__} have one shape")
    moved = 0
    for group in alike.values():
        values = [weight.detach().clone() for weight in group]
        for i, j in enumerate(torch.randperm(len(group), generator=generator).tolist()):
            with torch.no_grad():
                group[i].copy_(values[j])
            moved += i != j
    return moved
