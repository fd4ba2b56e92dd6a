"""Frozen weights in 8 bits: compress_weights() and expand_weights()."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..autograd.weights import decoded, encoded
from ..storage import Dense
from .calls import Formats, FunctionFormats
from .masked import MaskedWeight, is_shard
from .report import plain_name
from .swap import swap_innermost, unswap_innermost

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CALLS: frozenset[Callable] = frozenset({F.linear, F.conv1d, F.conv2d, F.conv3d})
_FORMATS: Formats = {"linear": Dense(), "convolution": Dense()}


class CompressedWeight:
    """In front of a layer's own class: ``weight`` is made of int8 codes and a scale a channel,
    buffers, whenever it is asked for; no parameter, it has no gradient.

    The layer's own forward runs, with ``F.linear`` and ``F.conv1d`` to ``F.conv3d`` served by
    memtl's, whose backward keeps the codes; torch's would keep the decoded weight.
    """

    memtl_weight_dtype: torch.dtype

    memtl_passes = True  # layers are found by the forward behind this one

    if TYPE_CHECKING:
        weight_codes: Tensor
        weight_scale: Tensor
        _parameters: dict[str, Any]
        _buffers: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        return decoded(self.weight_codes, self.weight_scale, self.memtl_weight_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
            return
        if not isinstance(value, Tensor) or value.shape != self.weight_codes.shape:
            raise ValueError(
                f"weight is compressed: it can be set to a tensor {list(self.weight_codes.shape)}; "
                "memtl.nn.expand_weights makes it a parameter again"
            )
        if value.requires_grad:
            raise ValueError(
                "weight is compressed and cannot train: memtl.nn.expand_weights makes it a "
                "parameter again"
            )
        self.memtl_encode(value)

    def memtl_encode(self, weight: Tensor) -> None:
        """Take the values of ``weight`` [O, ...] and its dtype.

        Raises:
            ValueError: a value is not finite.
        """
        codes, scale = encoded(weight)
        with torch.no_grad():  # in place: other layers may have the same weight
            self.weight_codes.copy_(codes)
            self.weight_scale.copy_(scale)
        self.memtl_weight_dtype = weight.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with FunctionFormats(_FORMATS, _CALLS):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What it makes of a weight of our dtype is our dtype from now on; codes and scales keep
        theirs, and with them their precision."""
        scale, device = self.weight_scale, self.weight_scale.device
        dtype = fn(torch.empty(0, dtype=self.memtl_weight_dtype, device=device)).dtype
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.memtl_weight_dtype = dtype
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        self.weight_codes = self.weight_codes.to(torch.int8)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # torch loads into a parameter, and reports what is wrong; what arrives is encoded.
        weight = nn.Parameter(self.weight, requires_grad=False)
        version = weight._version
        self._parameters["weight"] = weight
        try:
            super()._load_from_state_dict(  # type: ignore[misc]
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                error_msgs,
            )  # fmt: skip
            if weight._version != version:
                self.memtl_encode(weight)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight {error}.")
        finally:
            self._parameters["weight"] = None


def compress_weights(model: nn.Module, bits: int = 8) -> int:
    """Store the frozen weights of linear layers and convolutions in 8 bits, in place.

    Every ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, of a subclass or converted
    by memtl too, whose weight [O, ...] does not require a gradient gets codes, int8 [O, ...], and
    scales, float32 [O], in its place: symmetric, rounded to the nearest, by output channel. A
    scale is its channel's largest magnitude / 127, rounded up to 17 bits; no value moves by more
    than half of it, before it is rounded to the weight's own dtype.

    ``layer.weight`` then decodes them, and is no parameter: what is written into the tensor that it
    gives is lost (when LoRA is merged, say: :func:`expand_weights` first). ``state_dict()`` has the
    decoded values under the same key; ``load_state_dict()`` encodes what it is given, as does
    ``layer.weight =``. A weight that several such layers share stays shared (until ``.to()`` moves
    it); one that something else holds too, an embedding, is left alone, as are weights that are
    computed (parametrisations). Conversion before or after makes no difference. There is no second
    derivative through such a layer.

    Args:
        model: any module.
        bits: 8.

    Returns:
        How many weights there are in 8 bits now that were not.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``bits`` is not 8, there is nothing to compress, or a weight, which is named,
            holds a value that is not finite or is sharded over processes already: then no weight is
            changed.

    Memory: of weights one byte an element and 4 a channel. For backward none: the codes are kept
    by reference where x needs a gradient. The decoded weight is kept under torch.compile, which
    decides itself, under saved-tensor hooks other than :class:`memtl.memory.SavedTensors`, and
    where other code than the layer's forward uses it (``nn.MultiheadAttention`` that of its output
    layer, unless it is converted).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if type(bits) is not int or bits != 8:
        raise ValueError(f"bits must be 8, got {bits!r}")
    made = []
    for weight, holders in _compressible(model):
        if is_shard(weight):
            raise ValueError(
                f"{holders[0][0] or type(model).__name__}.weight is sharded: compress the weights "
                "first, fully_shard the model afterwards"
            )
        try:
            made.append((encoded(weight), weight.dtype, [layer for _, layer in holders]))
        except ValueError as error:
            raise ValueError(f"{holders[0][0] or type(model).__name__}.weight {error}") from None
    if not made:
        raise ValueError(
            f"nothing to compress in {type(model).__name__}: no linear layer or convolution has a "
            "frozen weight of its own"
        )
    for (codes, scale), dtype, layers in made:
        for layer in layers:
            layer._parameters["weight"] = None  # it keeps the place among the others
            layer.register_buffer("weight_codes", codes, persistent=False)
            layer.register_buffer("weight_scale", scale, persistent=False)
            swap_innermost(layer, CompressedWeight, memtl_weight_dtype=dtype)
    return len(made)


def check_weights(model: nn.Module, apart: Container[nn.Module] = ()) -> None:
    """Raise unless :func:`compress_weights` can do its work once all but the modules ``apart`` are
    frozen.

    Raises:
        ValueError: there is no weight to compress, or one, which is named, holds a value that is
            not finite.
    """
    found = False
    for name, module in model.named_modules():
        if not isinstance(module, KINDS) or module in apart:
            continue
        weight = module.weight
        if is_lazy(weight) or not weight.is_floating_point() or not weight.numel():
            continue
        found = True
        try:
            encoded(weight)
        except ValueError as error:
            raise ValueError(f"{plain_name(name) or type(model).__name__}.weight {error}") from None
    if not found:
        raise ValueError(f"nothing to compress in {type(model).__name__}")


def _compressible(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[tuple[str, nn.Module]]]]:
    """Each frozen weight, and the layers that share it, with their names."""
    holders: dict[nn.Parameter, list[tuple[str, str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((key, plain_name(name), module))
    for weight, held in holders.items():
        if is_lazy(weight) or weight.requires_grad or not weight.is_floating_point():
            continue
        if weight.layout != torch.strided or not weight.numel():
            continue
        if all(key == "weight" and isinstance(module, KINDS) for key, _, module in held):
            yield weight, [(name, module) for _, name, module in held]


def compressed(model: nn.Module) -> dict[str, CompressedWeight]:
    """The layers whose weight is in 8 bits, by the name of the weight in ``state_dict()``."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, CompressedWeight)
    }


def expand_weights(model: nn.Module) -> int:
    """Undo :func:`compress_weights`: weights are parameters again, frozen, with the decoded values.

    Returns:
        How many weights there were in 8 bits.

    Raises:
        ValueError: nothing in ``model`` is compressed.
    """
    layers: list[Any] = list(compressed(model).values())
    if not layers:
        raise ValueError(f"no weight of this {type(model).__name__} is compressed")
    made: dict[Tensor, nn.Parameter] = {}
    for layer in layers:
        codes = layer.weight_codes
        if codes not in made:
            made[codes] = nn.Parameter(layer.weight, requires_grad=False)
        unswap_innermost(layer, CompressedWeight)
        del layer.weight_codes, layer.weight_scale
        layer._parameters["weight"] = made[codes]
        if isinstance(layer, MaskedWeight):
            layer.memtl_hold()
    return len(made)
