"""The layers memtl knows. To add one: a class with ``@layer(role, names...)`` and a ``forward``.

A class here is mixed in front of a module's own class (:func:`memtl.nn.swap.swap`), so it adds a
``forward`` and nothing else: parameters, buffers, hooks and ``state_dict`` keys stay where they
are. ``self.memtl_format`` is how the layer keeps what it keeps. The names are those of the classes
that own the ``forward`` being replaced, so that a subclass with a forward of its own is left alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from ..storage import Format, Quantized

ROLES = ("linear", "convolution", "attention", "norm", "activation")

LAYERS: dict[str, type[Layer]] = {}
"""Qualified name of the class that owns a forward -> the layer that replaces it."""


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its calls not offered to the modes of the modules around it, one after another:
    of every property that is read that would cost as much as a small operation."""

    @functools.wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # costs nothing there
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return quiet


class Layer:
    """Base of every mixin: its role, and whether one particular module can be served."""

    role: str
    memtl_format: Format

    if TYPE_CHECKING:  # the attributes of the module's own class

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this module cannot be converted, or None."""
        return None

    @classmethod
    def describe(cls, format: Format) -> str:
        """What the layer keeps, for the report."""
        return str(format)


def kept_of_activation(format: Format) -> str:
    """What an activation with a curved derivative keeps, for the report."""
    what = "derivative" if isinstance(format, Quantized) and not format.rebuild else "input"
    return f"{what} {format}"


def layer(role: str, *names: str) -> Callable[[type[Layer]], type[Layer]]:
    """Register a mixin for the named classes."""

    def register(cls: type[Layer]) -> type[Layer]:
        cls.role = role
        cls.forward = alone(cls.forward)  # type: ignore[attr-defined]
        LAYERS.update(dict.fromkeys(names, cls))
        return cls

    return register


@layer("linear", "torch.nn.modules.linear.Linear")
class LinearLayer(Layer):
    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        # Not module.weight: to read a parametrised one may change it (spectral norm's iteration).
        others = (p.dtype for p in module.parameters() if not p.is_floating_point())
        return next((f"computes in {dtype}" for dtype in others), None)

    def forward(self, input: Tensor) -> Tensor:
        choose = getattr(self, "memtl_sparse_mask", None)
        mask = None if choose is None else choose(input)
        return functional.linear(input, self.weight, self.bias, format=self.memtl_format, mask=mask)


@layer("linear", "transformers.pytorch_utils.Conv1D")
class TransposedLinearLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.weight, self.bias, format=self.memtl_format, transposed=True
        )


@layer("norm", "torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm")
class LayerNormLayer(Layer):
    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        return "timm's fast norm (apex) is on" if getattr(module, "_fast_norm", False) else None

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            format=self.memtl_format,
        )


@layer("norm", "torch.nn.modules.normalization.RMSNorm")
class RMSNormLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, format=self.memtl_format
        )


@layer("norm", "transformers.models.llama.modeling_llama.LlamaRMSNorm")
class LlamaRMSNormLayer(Layer):
    """Also serves every class of transformers whose forward is LlamaRMSNorm's, byte for byte."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(
            hidden_states,
            self.weight.shape,
            self.weight,
            self.variance_epsilon,
            format=self.memtl_format,
            style="llama",
        )


@layer("norm", "transformers.models.t5.modeling_t5.T5LayerNorm")
class T5LayerNormLayer(LlamaRMSNormLayer):
    """The same where x and the weight are of one type."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super(LlamaRMSNormLayer, self).forward(hidden_states)  # type: ignore[misc]
        return super().forward(hidden_states)


@layer("norm", "transformers.models.gemma.modeling_gemma.GemmaRMSNorm")
class GemmaRMSNormLayer(Layer):
    """Also serves every class of transformers whose forward and ``_norm`` are GemmaRMSNorm's."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(
            x, self.weight.shape, self.weight, self.eps, format=self.memtl_format, style="gemma"
        )


class MaskLayer(Layer):
    """A layer whose backward needs one bit an element, whatever the format: exact."""

    @classmethod
    def describe(cls, format: Format) -> str:
        return "1 bit, exact"


class ActivationLayer(Layer):
    """An elementwise activation without parameters: one function of :mod:`memtl.functional`."""

    @classmethod
    def describe(cls, format: Format) -> str:
        return kept_of_activation(format)


# torch.compile does not show these three functions to a mode.


@layer("activation", "torch.nn.modules.activation.Hardswish")
class HardswishLayer(ActivationLayer):
    def forward(self, input: Tensor) -> Tensor:
        return functional.hardswish(input, self.inplace, format=self.memtl_format)


@layer("activation", "torch.nn.modules.activation.Hardsigmoid")
class HardsigmoidLayer(MaskLayer):
    def forward(self, input: Tensor) -> Tensor:
        return functional.hardsigmoid(input, self.inplace)


@layer("activation", "torch.nn.modules.activation.Threshold")
class ThresholdLayer(MaskLayer):
    def forward(self, input: Tensor) -> Tensor:
        return functional.threshold(input, self.threshold, self.value, self.inplace)


@layer("activation", "transformers.activations.GELUActivation", "transformers.activations.GELUTanh")
class HuggingFaceGELULayer(ActivationLayer):
    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        kernel = nn.functional.gelu
        if module.act is kernel or getattr(module.act, "func", None) is kernel:
            return None
        return "computes GELU by Python operators"

    def forward(self, input: Tensor) -> Tensor:
        approximate = getattr(self.act, "keywords", {}).get("approximate", "none")
        return functional.gelu(input, approximate, format=self.memtl_format)


@layer("activation", "transformers.activations.FastGELUActivation")
class FastGELULayer(ActivationLayer):
    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu_fast(input, format=self.memtl_format)


@layer("activation", "transformers.models.bloom.modeling_bloom.BloomGelu")
class BloomGELULayer(ActivationLayer):
    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu_bloom(x, format=self.memtl_format)


@layer("activation", "transformers.activations.NewGELUActivation")
class NewGELULayer(ActivationLayer):
    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu_new(input, format=self.memtl_format)


@layer(
    "activation",
    "transformers.activations.QuickGELUActivation",
    "timm.layers.activations.QuickGELU",
)
class QuickGELULayer(ActivationLayer):
    def forward(self, input: Tensor) -> Tensor:
        return functional.quick_gelu(input, format=self.memtl_format)


# Of these classes transformers keeps a copy in every model: layer -> where the first one is, and
# the methods that a copy must have in common with it, byte for byte.
_COPIED: dict[type[Layer], tuple[str, str, tuple[str, ...]]] = {
    LlamaRMSNormLayer: ("llama.modeling_llama", "LlamaRMSNorm", ("forward",)),
    T5LayerNormLayer: ("t5.modeling_t5", "T5LayerNorm", ("forward",)),
    GemmaRMSNormLayer: ("gemma.modeling_gemma", "GemmaRMSNorm", ("forward", "_norm")),
}


@functools.cache
def _copied_code(module: str, name: str, methods: tuple[str, ...]) -> tuple:
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    return _code_key(cls, methods)


def _code_key(cls: type, methods: tuple[str, ...]) -> tuple:
    """What the methods do."""
    codes = [getattr(getattr(cls, name, None), "__code__", None) for name in methods]
    # The first constant is the docstring.
    return tuple(c and (c.co_code, c.co_consts[1:], c.co_names) for c in codes)


def forward_owner(cls: type[nn.Module]) -> type[nn.Module]:
    """The class whose ``forward`` instances of ``cls`` run; a class with ``memtl_passes`` runs the
    next one's. Of a class that memtl made it is the mixin's."""
    return next(
        c
        for c in cls.__mro__
        if "forward" in vars(c) and not {"memtl_layer", "memtl_passes"} & vars(c).keys()
    )


def layer_for(module: nn.Module) -> type[Layer] | None:
    """The mixin that serves this module's forward, or None."""
    owner = forward_owner(type(module))
    found = LAYERS.get(f"{owner.__module__}.{owner.__qualname__}")
    named_norm = owner.__name__.endswith(("RMSNorm", "LayerNorm"))
    if found is None and named_norm and owner.__module__.startswith("transformers.models."):
        for mixin, original in _COPIED.items():
            if _code_key(owner, original[2]) == _copied_code(*original):
                return mixin
    return found
