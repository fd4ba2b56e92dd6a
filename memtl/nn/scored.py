"""Frozen weights of which scores choose what is used: score_weights()."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd.weights import chosen
from ..storage import Dense
from .calls import Formats, FunctionFormats
from .layers import Layer
from .swap import swap_innermost, swapped_in, unswap_innermost

Tensors = dict[str, Tensor]
Holders = Sequence[tuple[nn.Module, str]]
"""Every module that has a weight, and under which name."""

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_FORMATS: Formats = {"linear": Dense(), "convolution": Dense()}
_CALLS: frozenset[Callable] = frozenset(
    {
        F.linear, F.conv1d, F.conv2d, F.conv3d,
        F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    }
)  # fmt: skip


def _scores(key: str) -> str:
    return f"memtl_{key}_scores"


def _bits(key: str) -> str:
    return f"memtl_{key}_bits"


class ScoredWeight:
    """In front of a module's own class: who reads one of its scored weights gets what is chosen of
    it, the rest zero, and a gradient for the scores.

    The weight itself stays the parameter it was. The scores are a parameter of its shape,
    ``memtl_<weight>_scores``, what they choose is a buffer of one bit an element outside
    ``state_dict()``. A weight without scores goes with the choice of others.
    """

    memtl_scored: tuple[str, ...]
    """The names of the scored weights in this module."""

    if TYPE_CHECKING:
        _parameters: dict[str, Any]
        _buffers: dict[str, Any]

    def __getattr__(self, name: str) -> Any:  # parameters are no attributes: torch looks them up so
        if name in self.__dict__.get("memtl_scored", ()):
            scores = self._parameters.get(_scores(name))
            return chosen(self._parameters[name], scores, self._buffers[_bits(name)])
        return super().__getattr__(name)  # type: ignore[misc]


class ScoredLayer(ScoredWeight):
    """:class:`ScoredWeight` in front of a linear layer or convolution, whose functions are memtl's:
    backward makes the chosen weight again; torch's would keep it. Converted layers do so anyway."""

    memtl_passes = True  # layers are found by the forward behind this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Layer) or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with FunctionFormats(_FORMATS, _CALLS):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class Scores:
    """The scores of weights of a model, by any names; made by :func:`score_weights`.

    It is a hook: before every forward of the model, and at no other time, the scores choose anew.
    """

    handle: Any

    def __init__(
        self,
        holders: Mapping[str, Holders],
        scored: Iterable[str],
        choose: Callable[[Tensors], Tensors],
    ):
        self.holders = dict(holders)
        self.scored = tuple(scored)
        self.choose = choose
        self.chose = False
        """Whether there was a forward of the model yet."""

    def values(self) -> Tensors:
        """The scores as they are now."""
        first = {name: self.holders[name][0] for name in self.scored}
        return {n: getattr(module, _scores(key)).detach() for n, (module, key) in first.items()}

    def __call__(self, *_: Any) -> None:
        self.chose = True
        self.renew()

    def renew(self) -> None:
        """Let the scores choose. The bits are new tensors: a graph may hold the old ones."""
        for name, bits in self.choose(self.values()).items():
            for module, key in self.holders[name]:
                module._buffers[_bits(key)] = bits

    def remove(self) -> None:
        """Undo :func:`score_weights`."""
        self.handle.remove()
        for holders in self.holders.values():
            for module, key in holders:
                module._parameters.pop(_scores(key), None)
                del module._buffers[_bits(key)]
                module._non_persistent_buffers_set.discard(_bits(key))
        for module in self._modules():
            mixin = next(c for c in swapped_in(module) if issubclass(c, ScoredWeight))
            unswap_innermost(module, mixin)

    def _modules(self) -> dict[nn.Module, tuple[str, ...]]:
        found: dict[nn.Module, tuple[str, ...]] = {}
        for holders in self.holders.values():
            for module, key in holders:
                found[module] = (*found.get(module, ()), key)
        return found

    def _add(self, model: nn.Module, scores: Tensors) -> None:
        first = self.choose(scores)  # what may fail comes before any change
        parameters = {name: nn.Parameter(scores[name].clone()) for name in self.scored}
        for name, holders in self.holders.items():
            for module, key in holders:
                if name in parameters:
                    module.register_parameter(_scores(key), parameters[name])
                module.register_buffer(_bits(key), first[name], persistent=False)
        for module, keys in self._modules().items():
            mixin = ScoredLayer if isinstance(module, _LAYERS) else ScoredWeight
            swap_innermost(module, mixin, memtl_scored=keys)
        self.handle = model.register_forward_pre_hook(self)


def score_weights(
    model: nn.Module,
    holders: Mapping[str, Holders],
    scores: Tensors,
    choose: Callable[[Tensors], Tensors],
) -> Scores:
    """Let ``model`` compute with what scores choose of its weights, in place, and the scores train.

    Args:
        holders: by name, every module inside ``model`` that has the weight.
        scores: by name, of the weight's shape, on its device: where training starts. Of some of
            the weights at least.
        choose: of the scores the bits of what is used of every weight, uint8 [ceil(numel / 8)], on
            its device.

    Returns:
        The scores; their ``remove()`` undoes this.

    Memory: the scores and their gradients; one bit a weight. For backward nothing, where a linear
    layer or convolution multiplies; elsewhere what is chosen of the weight.
    """
    made = Scores(holders, scores, choose)
    made._add(model, scores)
    return made
