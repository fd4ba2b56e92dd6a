"""What belongs to a channel beside its filter: biases, and batch norms that read it alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .flow import Flow
from .patterns import Layout, surviving_channels
from .scope import inner_model, named_weights

if TYPE_CHECKING:
    from .ticket import Ticket


def channel_vectors(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The vectors that a pruned output channel of a layer takes with it, so that it is zero behind
    them: the layer's bias, scale and shift of a batch norm that reads this layer and nothing else,
    and so on through activations that leave zero what it is, pooling and depthwise convolutions,
    whose biases and norms are the channel's too.

    In a network that torch.fx cannot trace, where it is not known what reads what, these are the
    layers' own biases alone.

    Args:
        model: any module.

    Returns:
        For every layer that has any: the name of its weight, and those of the vectors, in the
        backbone. Their entries are the layer's output channels, in that order.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: peft has put adapters into it, or parameters are not initialised yet.
    """
    model = inner_model(model)
    named = named_weights(model)
    known = {id(weight.parameter): name for name, weight in named.items()}
    names = {module: name for name, module in model.named_modules()}
    try:
        followers = Flow(model, {}).followers
    except ValueError:
        followers = {}
    found = {}
    for name, weight in named.items():
        if not weight.linear or weight.embedding:
            continue
        vectors = []
        for module, key in weight.holders:
            vectors.append(module._parameters.get(key.replace("weight", "bias")))
            for follower in followers.get(names[module], ()):
                norm = model.get_submodule(follower)
                vectors += [p for p in norm._parameters.values() if p is not None and p.dim() == 1]
        own = dict.fromkeys(known[id(v)] for v in vectors if id(v) in known)
        if own:
            found[name] = tuple(own)
    return found


def with_vectors(ticket: Ticket, model: nn.Module) -> Ticket:
    """:meth:`Ticket.with_vectors`."""
    shapes = {layer.name: layer.shape for layer in ticket.layers}
    survivors: dict[str, Tensor] = {}
    for name, vectors in channel_vectors(model).items():
        if name in shapes:
            layout = Layout.of(shapes[name], ticket.transposed.get(name, 0))
            kept = surviving_channels(ticket.masks[name], layout)
            for vector in () if kept.all() else vectors:
                survivors[vector] = survivors.get(vector, torch.ones_like(kept)) & kept
    masks = {name: ticket.masks[name] for name in shapes}
    masks |= {name: torch.ops.memtl.bits_pack(kept) for name, kept in survivors.items()}
    shapes |= {name: tuple(kept.shape) for name, kept in survivors.items()}
    return dataclasses.replace(ticket, masks=masks, shapes=shapes, values=None)
