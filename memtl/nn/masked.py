"""Weights of which some entries are pruned: mask_weights() and unmask_weights() of one module."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..autograd.pruned import PrunedGradient
from .swap import swap_innermost, swapped_in, unswap_innermost


class MaskedWeight:
    """In front of a module's own class: the pruned entries of its weights are zero, and stay zero.

    Weights remain parameters. A hook on each makes the gradient of pruned entries zero before
    anything sees it, so that whatever an optimizer, an average or an exchange between processes
    makes of zero weights with zero gradients is zero. The bits are buffers ``<weight>_bits``, one
    bit an element, which move with the module and are no part of ``state_dict()``.
    """

    memtl_masked: tuple[str, ...]
    """The names of the masked weights in this module."""

    if TYPE_CHECKING:
        _parameters: dict[str, Any]
        _buffers: dict[str, Any]

    def memtl_hold(self) -> None:
        """Make the pruned entries zero, and see that their gradients will be."""
        for key in self.memtl_masked:
            self._hold(key)

    def _hold(self, key: str) -> None:
        weight = getattr(self, key)
        if weight.is_meta or is_shard(weight):  # numbers that are not there, or are in parts
            return
        bits = self._buffers[f"{key}_bits"] = self._buffers[f"{key}_bits"].to(weight.device)
        pruned = torch.ops.memtl.bits_apply(weight.detach(), bits, 1.0)
        if self._parameters[key] is None:  # in 8 bits: it is encoded again
            setattr(self, key, pruned)
            return
        weight.data.copy_(pruned)  # FSDP gathers weights for backward too: no new version
        _hook(weight, self, key)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter) and name in self.__dict__.get("memtl_masked", ()):
            self._hold(name)  # another parameter: one made by hand, or gathered by FSDP

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.memtl_hold()  # copies and pickles of parameters have no hooks

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # to_empty() and type() would not leave the bits what they are, nor would the meta device.
        bits = {name: self._buffers[name] for name in (f"{k}_bits" for k in self.memtl_masked)}
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._buffers.update(bits)
        self.memtl_hold()  # a weight may be another object now, or the same without its hooks
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if local_metadata.get("assign_to_params_buffers", False):
            # What is assigned is the caller's, and stays whole.
            names = [f"{prefix}{key}" for key in self.memtl_masked]
            copies = {name: state_dict[name].clone() for name in names if name in state_dict}
            state_dict = {**state_dict, **copies}
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.memtl_hold()


def is_shard(weight: Tensor) -> bool:
    """Whether this process has a part of it alone: a DTensor, as ``fully_shard`` makes them."""
    return hasattr(weight, "placements")


class _Hook:
    """Makes the gradient of pruned entries zero, while the module has the weight."""

    def __init__(self, module: MaskedWeight, key: str):
        self.module = weakref.ref(module)  # a hook that held it would hold the weight itself
        self.key = key

    def __call__(self, grad: Tensor) -> Tensor:
        module: Any = self.module()
        if module is None:
            return grad
        return PrunedGradient.apply(grad, module._buffers[f"{self.key}_bits"])


def _hook(weight: nn.Parameter, module: MaskedWeight, key: str) -> None:
    _unhook(weight, module)
    trains = weight.requires_grad
    weight.requires_grad_(True)  # torch takes hooks of no other tensors; this one may be thawed
    weight.register_hook(_Hook(module, key))
    weight._backward_hooks = weight._backward_hooks  # torch.utils.swap_tensors took them off
    weight.requires_grad_(trains)


def _unhook(weight: nn.Parameter, module: MaskedWeight) -> None:
    hooks: dict = weight._backward_hooks or {}
    for id, hook in list(hooks.items()):
        if isinstance(hook, _Hook) and hook.module() in (module, None):
            del hooks[id]


def mask_weights(
    module: nn.Module,
    bits: Mapping[str, Tensor],
    mixin: type[MaskedWeight] = MaskedWeight,
    **attributes: Any,
) -> None:
    """Prune weights of ``module`` in place, for good (:class:`MaskedWeight`).

    Args:
        bits: for each of the module's own parameters that is pruned the bits of its surviving
            elements, uint8 [ceil(numel / 8)], least significant bit first, on its device.
        mixin, attributes: :class:`MaskedWeight`, or one that derives from it, and what it needs.

    Memory: the bits.
    """
    for key, mask in bits.items():
        module.register_buffer(f"{key}_bits", mask, persistent=False)
    swap_innermost(module, mixin, memtl_masked=tuple(bits), **attributes)
    module.memtl_hold()  # type: ignore[operator]


def unmask_weights(module: nn.Module) -> None:
    """Undo :func:`mask_weights`: pruned entries are zero still, and may change."""
    assert isinstance(module, MaskedWeight)
    for key in module.memtl_masked:
        if (weight := module._parameters[key]) is not None:
            _unhook(weight, module)
        del module._buffers[f"{key}_bits"]
        module._non_persistent_buffers_set.discard(f"{key}_bits")
    mixin = next(c for c in swapped_in(module) if issubclass(c, MaskedWeight))
    unswap_innermost(module, mixin)


def masked_weights(model: nn.Module) -> Iterator[tuple[str, str, Any, Tensor]]:
    """Every masked weight of ``model``: the names of its module and in that, the module, its bits.
    One that several modules share comes several times."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedWeight):
            for key in module.memtl_masked:
                yield name, key, module, module._buffers[f"{key}_bits"]


def is_masked(model: nn.Module) -> bool:
    """Whether any weight of ``model`` is masked."""
    return any(isinstance(module, MaskedWeight) for module in model.modules())


def parameter_masks(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The bits of every masked parameter of ``model``, as an optimizer of survivors takes them."""
    return {
        parameter: bits
        for _, key, module, bits in masked_weights(model)
        if (parameter := module._parameters[key]) is not None
    }
