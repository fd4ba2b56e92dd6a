"""A smaller dense network in the place of one of which whole channels are pruned."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...nn.masked import is_masked
from .flow import Flow
from .patterns import Layout, surviving_channels, unpacked
from .scope import inner_model, named_weights

if TYPE_CHECKING:
    from .ticket import Ticket


@dataclasses.dataclass(frozen=True)
class MaterialisedLayer:
    """A linear layer or convolution.

    Attributes:
        name: of the module.
        before, after: shapes of its weight.
        channels: output channels before.
        removed: how many of them are gone.
        left: filters that are pruned and still there, since something needs their channels (a
            residual sum, say, with a channel that lives), or since channels are not followed
            through this layer.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    channels: int
    removed: int
    left: int


@dataclasses.dataclass(frozen=True)
class Materialised:
    """What :meth:`memtl.Ticket.materialise` made. ``print`` it.

    Attributes:
        model: the smaller network.
        ticket: what is still pruned in it; None: nothing. Apply it to go on training the same
            subnetwork.
        layers: every linear layer and convolution with what became of it.
        parameters_before, parameters_after: numbers of them in the whole model.
    """

    model: nn.Module
    ticket: Ticket | None
    layers: tuple[MaterialisedLayer, ...]
    parameters_before: int
    parameters_after: int

    @property
    def channels(self) -> int:
        """Output channels of all layers before."""
        return sum(layer.channels for layer in self.layers)

    @property
    def removed(self) -> int:
        """How many of them are gone."""
        return sum(layer.removed for layer in self.layers)

    @property
    def left(self) -> int:
        """How many are pruned and still there."""
        return sum(layer.left for layer in self.layers)

    def __str__(self) -> str:
        share = f"{self.removed:,} of {self.channels:,} channels removed"
        left = f"{self.left:,} pruned ones left"
        sizes = f"{self.parameters_before:,} parameters before, {self.parameters_after:,} after"
        lines = [f"{share} ({self.removed / self.channels:.1%}), {left}; {sizes}"]
        width = max(len(layer.name) for layer in self.layers)
        for layer in self.layers:
            change = f"{list(layer.before)} -> {list(layer.after)}"
            left = f"  {layer.left} left" if layer.left else ""
            lines.append(f"  {layer.name.ljust(width)}  {change}{left}")
        return "\n".join(lines)


def materialise(ticket: Ticket, model: nn.Module) -> Materialised:
    """:meth:`memtl.Ticket.materialise`."""
    source = inner_model(model)
    if is_masked(source) and type(ticket).of(source) != ticket:
        raise ValueError(f"the ticket of this {type(source).__name__} is another one")
    model = copy.deepcopy(source)
    if not is_masked(model):
        ticket.apply(model, sparse=False)
    ticket.remove(model)  # the pruned weights are zero
    places, surviving = _surviving(ticket, model)
    layouts = {
        la.name: Layout.of(la.shape, ticket.transposed.get(la.name, 0)) for la in ticket.layers
    }
    kept = {places[n]: surviving_channels(ticket.masks[n], layout) for n, layout in layouts.items()}
    if all(rows.all() for rows in kept.values()):
        raise ValueError(
            "no whole channel is pruned by this ticket: draw one with pattern='channel'"
        )
    flow = Flow(model, surviving)
    before = sum(p.numel() for p in model.parameters())
    modules = dict(model.named_modules())
    shapes = {
        name: tuple(modules[name]._parameters["weight"].shape)
        for name, attribute in flow.sizes
        if attribute in ("out_channels", "out_features")
    }
    _fold(flow, modules)
    _slice(flow, modules)
    layers = []
    for name, shape in shapes.items():
        there = flow.kept(flow.tied[name, "weight", 0])
        gone = len(there) - int(there.sum())
        left = int((there & ~kept.get((name, "weight"), there)).sum())
        small = tuple(modules[name]._parameters["weight"].shape)
        layers.append(MaterialisedLayer(name, shape, small, shape[0], gone, left))
    for layer in ticket.layers:  # those that nothing is known of
        name, key = places[layer.name]
        if name not in shapes:
            shape, rows = layer.shape, kept[name, key]
            name = name if key == "weight" else _joined(name, key)
            left = int((~rows).sum())
            layers.append(MaterialisedLayer(name, shape, shape, len(rows), 0, left))
    rest = _rest(ticket, flow, places, surviving)
    after = sum(p.numel() for p in model.parameters())
    return Materialised(model, rest, tuple(layers), before, after)


def _surviving(
    ticket: Ticket, model: nn.Module
) -> tuple[dict[str, tuple[str, str]], dict[str, Tensor]]:
    """Where in ``model`` the weights of the ticket are: module and key by the ticket's names; and
    what survives of each by its name in the model."""
    names = {module: name for name, module in model.named_modules()}
    weights = named_weights(model)
    places, surviving = {}, {}
    for name, bits in ticket.masks.items():
        module, key = weights[name].holders[0]
        places[name] = names[module], key
        surviving[_joined(*places[name])] = unpacked(bits, ticket.shapes[name])
    return places, surviving


def _joined(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _fold(flow: Flow, modules: dict[str, Any]) -> None:
    """Put the constants of the channels that go into the biases of the layers that read them."""
    for name, ids, value in flow.folds:
        value = value.where(~flow.kept(ids), 0.0)
        if value.any():
            weight, bias = modules[name].weight, modules[name].bias
            sums = weight.detach().double().flatten(2).sum(2) if weight.dim() > 2 else weight
            with torch.no_grad():
                bias += (sums.double() @ value.to(weight.device)).to(bias.dtype)


def _slice(flow: Flow, modules: dict[str, Any]) -> None:
    """Take the channels that go out of parameters, buffers and attributes."""
    for (name, key, dim), ids in flow.tied.items():
        module, kept = modules[name], flow.kept(ids)
        if kept.all():
            continue
        tensor = {**module._buffers, **module._parameters}[key]
        small = tensor.detach().index_select(dim, kept.nonzero().view(-1).to(tensor.device))
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(small, tensor.requires_grad)
        else:
            module._buffers[key] = small
    for (name, attribute), ids in flow.sizes.items():
        setattr(modules[name], attribute, int(flow.kept(ids).sum()))
    for name in {name for name, attribute in flow.sizes if attribute == "in_channels"}:
        module = modules[name]
        module.groups = module.in_channels // module._parameters["weight"].shape[1]


def _rest(
    ticket: Ticket,
    flow: Flow,
    places: dict[str, tuple[str, str]],
    surviving: dict[str, Tensor],
) -> Ticket | None:
    """The ticket of what is left of the weights and pruned in there."""
    masks, shapes = {}, {}
    for name, place in places.items():
        mask = surviving[_joined(*place)]
        for dim in range(mask.dim()):
            if (ids := flow.tied.get((*place, dim))) is not None:
                mask = mask.index_select(dim, flow.kept(ids).nonzero().view(-1))
        if not mask.all():
            masks[name], shapes[name] = torch.ops.memtl.bits_pack(mask), tuple(mask.shape)
    if not masks:
        return None
    turned = {name: groups for name, groups in ticket.transposed.items() if name in masks}
    return dataclasses.replace(ticket, masks=masks, shapes=shapes, values=None, transposed=turned)
