"""A ticket: which weights of a network survive, at one bit a weight."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import count_bits
from ...nn.masked import is_masked, mask_weights, masked_weights, unmask_weights
from ...nn.report import plain_name
from ...nn.sparse import SparseLinear, can_be_sparse
from .channels import with_vectors
from .config import TicketConfig
from .masks import check_mask, random_masks
from .materialise import Materialised, materialise
from .patterns import UNSTRUCTURED, Layout, shuffled_mask
from .saved import read, write
from .scope import (
    Weight,
    backbone_of,
    check_unmasked,
    inner_model,
    named_weights,
    transposed,
)

SHOWN = 3
"""Mismatches that an error names."""

RECORD = "memtl_ticket"

PEFT = re.compile(r"(?<=\.)(base_layer|original_module|modules_to_save\.\w+)\.")
"""What peft puts into the names of weights."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a ticket comes from.

    Attributes:
        model: class of the model it was drawn from.
        fingerprint: sha256 of the weights in scope that it was drawn from; of an iterative draw,
            those at its start.
        task: what the user called it.
        scheme: the configuration's, and what was done to the masks since.
        round: after how many rounds.
    """

    model: str
    fingerprint: str
    task: str = ""
    scheme: str = "magnitude"
    round: int = 1


@dataclasses.dataclass(frozen=True)
class TicketLayer:
    """One weight of a ticket: how many of its elements survive."""

    name: str
    shape: tuple[int, ...]
    kept: int

    @property
    def size(self) -> int:
        """Elements in all."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """The share that survives."""
        return self.kept / self.size

    @property
    def sparsity(self) -> float:
        """The share that is pruned."""
        return 1 - self.density


@dataclasses.dataclass(frozen=True)
class AppliedTicket:
    """What :meth:`Ticket.apply` did. ``print`` it.

    Attributes:
        pruned, total: elements of the weights in the ticket.
        mask_bytes: what the masks take in the model.
        optimizer_bytes: of AdamW's state, two float32 an element, what belongs to pruned weights.
        sparse: names of the weights whose products run over the survivors alone.
    """

    pruned: int
    total: int
    mask_bytes: int
    optimizer_bytes: int
    sparse: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"pruned {self.pruned:,} of {self.total:,} weights "
            f"({self.pruned / self.total:.1%}), masks {self.mask_bytes:,} bytes; of AdamW's state "
            f"{self.optimizer_bytes:,} bytes belong to pruned weights; "
            f"{len(self.sparse)} layers run sparse"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """Which weights of a network survive. Made by :func:`memtl.draw_ticket`, :meth:`load` and
    :meth:`of`; two are equal if their masks are.

    Where whole channels are pruned, the masks are also of the biases and the norms' vectors that
    go with them. Those are not counted as weights.

    Attributes:
        masks: by the name of the weight in the backbone, uint8 [ceil(numel / 8)], row by row, least
            significant bit first, on the CPU.
        shapes: of those weights.
        config: how it was drawn.
        source: of what.
        values: the surviving weights, [kept] each, where the file that was loaded has them.
        transposed: of a ticket with a pattern, the groups of weights that are [I, O / groups, ...]
            (transposed convolutions, transformers' Conv1D); others are [O, I / groups, ...].

    Raises:
        ValueError: a mask, or ``transposed``, does not fit its weight's shape.
    """

    masks: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    config: TicketConfig
    source: Source
    values: dict[str, Tensor] | None = None
    transposed: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.masks.keys() != self.shapes.keys():
            raise ValueError("masks and shapes have to be of the same weights")
        for name, bits in self.masks.items():
            check_mask(name, bits, math.prod(self.shapes[name]))
        for name, groups in self.transposed.items():
            if groups < 1 or self.shapes.get(name, (1,))[0] % groups:
                raise ValueError(f"{name} cannot be transposed in {groups} groups")

    @property
    def layers(self) -> tuple[TicketLayer, ...]:
        """Every weight with its shape and what of it survives."""
        return tuple(layer for layer in self._every if len(layer.shape) > 1)

    @property
    def vectors(self) -> tuple[TicketLayer, ...]:
        """Every bias, and scale or shift of a norm, that pruned channels have a part of."""
        return tuple(layer for layer in self._every if len(layer.shape) == 1)

    @property
    def _every(self) -> tuple[TicketLayer, ...]:
        return tuple(
            TicketLayer(name, self.shapes[name], count_bits(bits))
            for name, bits in self.masks.items()
        )

    @property
    def sparsity(self) -> float:
        """The share of all weights of the ticket that is pruned."""
        layers = self.layers
        return 1 - sum(layer.kept for layer in layers) / sum(layer.size for layer in layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the masks: one bit a weight."""
        return sum(bits.nbytes for bits in self.masks.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ticket):
            return NotImplemented
        return self.shapes == other.shapes and all(
            torch.equal(bits, other.masks[name]) for name, bits in self.masks.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        layers = self.layers
        kept, total = sum(layer.kept for layer in layers), sum(layer.size for layer in layers)
        groups: dict[tuple[str, tuple[int, ...]], list[TicketLayer]] = {}
        for layer in layers:
            groups.setdefault((re.sub(r"\b\d+\b", "*", layer.name), layer.shape), []).append(layer)
        rows = []
        for (pattern, shape), members in groups.items():
            label = f"{pattern} x{len(members)}" if len(members) > 1 else members[0].name
            shares = sorted({f"{100 * layer.sparsity:5.1f}" for layer in members})
            span = shares[0] if len(shares) == 1 else f"{shares[0]} ..{shares[-1]}"
            rows.append((label, str(list(shape)), span))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        task = f" of {self.source.task}" if self.source.task else ""
        pattern = "" if self.config.pattern == UNSTRUCTURED else f" {self.config.pattern}"
        title = f"{self.source.scheme}{pattern} ticket{task}, round {self.source.round}"
        pruned = f"{100 * (1 - kept / total):.1f} % pruned, masks {self.nbytes:,} bytes"
        lines = [f"{title}: {kept:,} of {total:,} weights survive, {pruned}"]
        lines += [f"  {a.ljust(widths[0])}  {b.ljust(widths[1])}  {c} %" for a, b, c in rows]
        return "\n".join(lines)

    def apply(self, model: nn.Module, sparse: bool | None = None) -> AppliedTicket:
        """Prune ``model`` in place: what the ticket does not keep is zero from now on, whatever
        trains the rest.

        Gradients of pruned weights are exactly zero before an optimizer, an accumulation or an
        exchange between processes sees them, so that momentum, weight decay and averages of weights
        leave them zero; ``load_state_dict`` does not bring them back. Names and keys of
        ``state_dict`` stay, as do copies and pickles; conversion and freezing, before or after,
        make no difference; nor do DistributedDataParallel and FSDP around the model (of the older
        FSDP with ``use_orig_params=True``). Make the optimizer afterwards: momentum from before
        would move pruned weights. Two things are not seen, and :meth:`hold` is for them: what is
        written into a weight by hand (merging an adapter, say), and optimizers that move a weight
        whose own gradients are zero, which Muon, Kron and Shampoo do. Tensors that
        ``torch.func.functional_call`` puts in the place of parameters are not masked.

        Args:
            model: any that has the ticket's weights in its backbone, with any head.
            sparse: whether linear layers multiply with the surviving weights alone, which changes
                the order of sums: None where that is faster, which depends on what survives and, at
                every call, on the input (its rows, dtype and device); True always, False never.
                There is no second derivative through sparse products.

        Raises:
            TypeError: ``model`` is no module, or ``sparse`` none of these.
            ValueError: weights are missing, of another shape, an embedding's too, on the meta
                device, made in inference mode or in the memory of another one, or ``model`` has a
                ticket: nothing is changed then.

        Memory: one bit a weight.
        """
        if sparse not in (None, True, False):
            raise TypeError(f"sparse must be None, True or False, got {sparse!r}")
        model = inner_model(model)
        weights = self._weights(model)
        check_unmasked(model)
        layers = {layer.name: layer for layer in self.layers}
        inside: dict[nn.Module, dict[str, str]] = {}
        bits = {}
        for name, weight in weights.items():
            bits[name] = self.masks[name].to(weight.parameter.device, copy=True)
            for module, key in weight.holders:
                inside.setdefault(module, {})[key] = name
        running: list[str] = []
        for module, names in inside.items():
            masks = {key: bits[name] for key, name in names.items()}
            layer = layers.get(names.get("weight", ""))
            density = None if sparse or layer is None else layer.density
            if sparse is not False and layer is not None and can_be_sparse(module, density):
                mask_weights(module, masks, SparseLinear, memtl_density=density)
                running.append(layer.name)
            else:
                mask_weights(module, masks)
        model.__dict__[RECORD] = (self.config, self.source)
        total = sum(layer.size for layer in layers.values())
        pruned = total - sum(layer.kept for layer in layers.values())
        optimizer = 2 * 4 * pruned
        return AppliedTicket(pruned, total, self.nbytes, optimizer, tuple(dict.fromkeys(running)))

    @staticmethod
    def hold(model: nn.Module) -> None:
        """Make the pruned weights of ``model`` zero again, after something wrote into them:
        ``optimizer.register_step_post_hook(lambda *_: memtl.Ticket.hold(model))``.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: it has no ticket.
        """
        model = inner_model(model)
        if not is_masked(model):
            raise ValueError(f"this {type(model).__name__} has no ticket")
        for module in {module: None for _, _, module, _ in masked_weights(model)}:
            module.memtl_hold()

    def remove(self, model: nn.Module) -> None:
        """Undo :meth:`apply`: pruned weights are zero still, and may change.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: its ticket is not this one.
        """
        if Ticket.of(model) != self:
            raise ValueError(f"the ticket of this {type(model).__name__} is another one")
        model = inner_model(model)
        for module in {module: None for _, _, module, _ in masked_weights(model)}:
            unmask_weights(module)
        del model.__dict__[RECORD]

    def materialise(self, model: nn.Module) -> Materialised:
        """A smaller copy of ``model`` without the channels that the ticket prunes: the same class,
        modules and names, smaller tensors, and in evaluation mode the outputs of the model under
        this ticket, up to rounding.

        A channel goes where every layer behind it can do without: where it is zero, or a constant
        that goes into the bias of an unpadded convolution or a linear layer. In a residual sum it
        is pruned in all summands then, and in a convolution with groups all of a group are. What
        cannot go stays, pruned, and is reported. Channels are followed through convolutions,
        linear layers, batch norms, activations, pooling, sums, products, concatenation and
        flattening; where anything else reads them they stay.

        The copy has no ticket; :attr:`Materialised.ticket` is what is left of this one. Attributes
        of a model that repeat its layers' sizes are as they were (timm's ``num_features``, by which
        a new head is made), so give the model its head first, and its optimizer afterwards.

        Args:
            model: any that has the ticket's weights, whether or not the ticket is applied. It stays
                as it is.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: no whole channel is pruned; the model cannot be traced by torch.fx; it has
                another ticket; or as :meth:`apply`.

        Memory: the copy, of the whole model at first.
        """
        return materialise(self, model)

    @staticmethod
    def of(model: nn.Module) -> Ticket:
        """The ticket that was applied to ``model``.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: there is none.
        """
        model = inner_model(model)
        if RECORD not in model.__dict__:
            raise ValueError(f"this {type(model).__name__} has no ticket")
        config, source = model.__dict__[RECORD]
        masks, shapes, groups, seen = {}, {}, {}, set()
        for inside, key, module, bits in masked_weights(backbone_of(model)):
            parameter = module._parameters[key]
            if parameter is not None and id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = PEFT.sub("", plain_name(f"{inside}.{key}"))
            if name in masks:  # the copy of a module that peft trains
                continue
            masks[name] = bits.to("cpu", copy=True)
            shapes[name] = tuple(getattr(module, key).shape)
            vector = len(shapes[name]) == 1
            if config.pattern != UNSTRUCTURED and not vector and (count := transposed(module)):
                groups[name] = count
        return Ticket(masks, shapes, config, source, transposed=groups)

    def shuffled(self, seed: int) -> Ticket:
        """A control: as many survivors in every weight, but any: any groups, if the ticket has a
        pattern; of "N:M" any N of each M. Vectors of channels are whole in it, and pruned by
        :meth:`with_vectors` again."""
        generator = torch.Generator().manual_seed(seed)
        masks = {}
        for layer in self.layers:
            name, pattern = layer.name, self.config.pattern
            if pattern == UNSTRUCTURED:
                masks[name] = random_masks([layer.size], layer.kept, generator)[0]
            else:
                layout = Layout.of(layer.shape, self.transposed.get(name, 0))
                masks[name] = shuffled_mask(self.masks[name], layout, pattern, generator)
        scheme = f"{self.source.scheme}, shuffled by {seed}"
        source = dataclasses.replace(self.source, scheme=scheme)
        shapes = {layer.name: layer.shape for layer in self.layers}
        return Ticket(masks, shapes, self.config, source, transposed=dict(self.transposed))

    def with_vectors(self, model: nn.Module) -> Ticket:
        """This ticket, but what it prunes of biases and norms is what goes with the channels of
        ``model`` that it prunes as a whole (:func:`channel_vectors`). Drawn tickets of the pattern
        "channel" have it. Saved weights are not in it.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: as :meth:`apply`, of a model that does not fit.
        """
        self._weights(inner_model(model))
        return with_vectors(self, model)

    def overlap(self, other: Ticket) -> float:
        """Survivors of both, relative to those of either, in the weights that both tickets have.

        Raises:
            ValueError: there are none, or they have other shapes.
        """
        common = [layer.name for layer in self.layers if layer.name in other.masks]
        if not common:
            raise ValueError("the tickets have no weight in common")
        for name in common:
            if self.shapes[name] != other.shapes[name]:
                raise ValueError(
                    f"{name} is {list(self.shapes[name])} here and {list(other.shapes[name])} there"
                )
        both = sum(count_bits(self.masks[name] & other.masks[name]) for name in common)
        either = sum(count_bits(self.masks[name] | other.masks[name]) for name in common)
        return both / either

    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> Path:
        """Write the ticket to one safetensors file; an interruption leaves what was there.

        Args:
            model: its surviving weights are written too, in its dtype, for :meth:`restore`; without
                it those that the ticket was loaded with.

        Returns:
            The path.

        Raises:
            ValueError: as :meth:`apply`, of a model that does not fit.
        """
        values = self.values
        if model is not None:
            weights = self._weights(inner_model(model))
            values = {
                layer.name: torch.ops.memtl.bits_select(
                    (w := weights[layer.name].parameter.detach()),
                    self.masks[layer.name].to(w.device),
                    layer.kept,
                ).cpu()
                for layer in self._every
            }
        path = Path(path)
        about = {
            "config": self.config.to_dict(),
            "source": dataclasses.asdict(self.source),
            "transposed": self.transposed,
        }
        kept = {layer.name: (layer.shape, layer.kept) for layer in self._every}
        write(path, about, kept, self.masks, values)
        return path

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Ticket:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, altered, or of another kind or version.
        """
        path = Path(path)
        about, shapes, masks, values = read(path)
        try:
            config = TicketConfig.from_dict(about["config"])
            source = Source(**about["source"])
            groups = dict(about.get("transposed", {}))
            return Ticket(masks, shapes, config, source, values, groups)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None

    def restore(self, model: nn.Module) -> None:
        """Put the surviving weights that were saved with the ticket into ``model``; pruned ones are
        zero then, whether or not the ticket is applied.

        Raises:
            ValueError: the ticket has no weights, or as :meth:`apply`; or ``model`` has another
                ticket.
        """
        if self.values is None:
            raise ValueError("this ticket was saved without weights: save(path, model) has them")
        model = inner_model(model)
        weights = self._weights(model)
        if is_masked(model) and Ticket.of(model) != self:
            raise ValueError(f"this {type(model).__name__} has another ticket")
        for name, weight in weights.items():
            p = weight.parameter
            bits, values = self.masks[name].to(p.device), self.values[name].to(p)
            with torch.no_grad():
                p.copy_(torch.ops.memtl.bits_expand(values, bits, p.shape))

    def _weights(self, model: Any) -> dict[str, Weight]:
        """The ticket's weights in ``model``, all of which are there and fit."""
        named = named_weights(model)
        wrong = []
        places: dict[int, str] = {}
        for name, shape in self.shapes.items():
            weight = named.get(name)
            if weight is None:
                wrong.append(f"{name}: there is no such weight")
            elif tuple(weight.parameter.shape) != shape:
                wrong.append(
                    f"{name}: {list(shape)} in the ticket, {list(weight.parameter.shape)} here"
                )
            elif weight.embedding:
                wrong.append(f"{name}: is an embedding's too")
            elif weight.obstacle:
                wrong.append(f"{name}: {weight.obstacle}")
            elif places.setdefault(weight.parameter.data_ptr(), name) != name:
                place = places[weight.parameter.data_ptr()]
                wrong.append(f"{name}: has the memory of {place}, but is another parameter")
        if wrong:
            more = [f"... {len(wrong)} in all"] if len(wrong) > SHOWN else []
            raise ValueError(
                f"the ticket does not fit this {type(model).__name__}:\n  "
                + "\n  ".join(wrong[:SHOWN] + more)
            )
        return {name: named[name] for name in self.masks}
