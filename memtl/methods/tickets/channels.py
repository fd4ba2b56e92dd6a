"""What belongs to a channel beside its filter: biases, and batch norms that read it alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
        vectors: list[nn.Parameter | None] = []
        modules: set[nn.Module] = set()
        for module, key in weight.holders:
            vectors.append(module._parameters.get(key.replace("weight", "bias")))
            behind = [model.get_submodule(f) for f in followers.get(names[module], ())]
            for norm in behind:
                vectors += [p for p in norm._parameters.values() if p is not None and p.dim() == 1]
            modules |= {module, *behind}
        every = dict.fromkeys(known[id(v)] for v in vectors if id(v) in known)
        # What others hold too is not this layer's alone.
        own = [v for v in every if all(h.module in modules for h in named[v].holders)]
        if own:
            found[name] = tuple(own)
    return found


def with_vectors(ticket: Ticket, model: nn.Module) -> Ticket:
    """:meth:`Ticket.with_vectors`."""
    shapes = {layer.name: layer.shape for layer in ticket.layers}
    masks = {name: ticket.masks[name] for name in shapes}
    layouts = {n: Layout.of(shape, ticket.transposed.get(n, 0)) for n, shape in shapes.items()}
    for name, kept in surviving_entries(channel_vectors(model), masks, layouts).items():
        if not kept.all():
            masks[name], shapes[name] = torch.ops.memtl.bits_pack(kept), tuple(kept.shape)
    return dataclasses.replace(ticket, masks=masks, shapes=shapes, values=None)


def surviving_entries(
    vectors: Mapping[str, tuple[str, ...]],
    masks: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
) -> dict[str, Tensor]:
    """Of the ``vectors`` of every layer (:func:`channel_vectors`) that has a mask, bool [outputs]:
    what survives under the masks. Of a vector of several layers that is what all of them keep."""
    survivors: dict[str, Tensor] = {}
    for name in (n for n in vectors if n in masks):
        kept = surviving_channels(masks[name], layouts[name])
        for vector in vectors[name]:
            survivors[vector] = survivors.get(vector, torch.ones_like(kept)) & kept
    return survivors
