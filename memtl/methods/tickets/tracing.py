"""A network as a graph of layers and functions, for those who ask what reads what."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

from torch import fx, nn

from ...nn.convert import unconvert
from ...nn.layers import Layer, forward_owner
from ...nn.swap import original_class

KINDS = {
    "convolution": (
        "torch.nn.modules.conv.Conv1d",
        "torch.nn.modules.conv.Conv2d",
        "torch.nn.modules.conv.Conv3d",
        "timm.layers.conv2d_same.Conv2dSame",
    ),
    "linear": ("torch.nn.modules.linear.Linear", "timm.layers.linear.Linear"),
    "norm": (
        "torch.nn.modules.batchnorm._BatchNorm",
        "torch.nn.modules.batchnorm.SyncBatchNorm",
        "torchvision.ops.misc.FrozenBatchNorm2d",
        "timm.layers.norm_act.BatchNormAct2d",
        "timm.layers.norm_act.FrozenBatchNormAct2d",
        "timm.layers.norm_act.SyncBatchNormAct",
    ),
    "pointwise": tuple(
        f"torch.nn.modules.activation.{name}"
        for name in "CELU ELU GELU Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU "
        "ReLU SELU SiLU Sigmoid Softplus Softsign Tanh Tanhshrink Threshold".split()
    ),
    "identity": ("torch.nn.modules.linear.Identity",),
    "pool": (
        *(
            f"torch.nn.modules.pooling.{kind}Pool{n}d"
            for n in (1, 2, 3)
            for kind in ("Max", "AdaptiveAvg", "AdaptiveMax")
        ),
        "timm.layers.pool2d_same.MaxPool2dSame",
        "torch.nn.modules.upsampling.Upsample",
    ),
    "zeros": (
        *(f"torch.nn.modules.pooling.AvgPool{n}d" for n in (1, 2, 3)),
        "timm.layers.pool2d_same.AvgPool2dSame",
        *(
            f"torch.nn.modules.dropout.{name}"
            for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d")
        ),
        *(f"torch.nn.modules.padding.ZeroPad{n}d" for n in (1, 2, 3)),
    ),
    "flatten": ("torch.nn.modules.flatten.Flatten",),
}
"""What a layer does to channels, by the qualified names of the classes that own the forward:
"convolution" and "linear" mix them, "norm" treats each by numbers of its own, "pointwise" every
element by itself, "pool" makes of a constant channel one with that constant, "zeros" at least of
zeros zeros."""

_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


def layer_kind(module: nn.Module) -> str | None:
    """What ``module`` does to channels, one of :data:`KINDS`; None if that is not known."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    owner = forward_owner(original_class(module))
    kind = _KIND_OF.get(f"{owner.__module__}.{owner.__qualname__}")
    if kind in ("convolution", "linear") and module._parameters.get("weight") is None:
        return None  # it is computed, by a parametrisation or from 8 bits
    return kind


def pads_with_zeros(layer: Any) -> bool:
    """Whether a convolution sees zeros at the border of a map."""
    if forward_owner(original_class(layer)).__name__ == "Conv2dSame":
        return True
    padding = layer.padding
    none = padding == "valid" if isinstance(padding, str) else not any(padding)
    return layer.padding_mode == "zeros" and not none


def trace(model: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """A copy of ``model`` in evaluation mode, not converted, with the same tensors; and its graph,
    in which layers that libraries ask not to look into are taken whole.

    Raises:
        ValueError: the model cannot be traced.
    """
    try:
        return _trace(model)
    except Exception as error:  # tracing runs the model's own code
        raise ValueError(
            f"this {type(model).__name__} cannot be traced by torch.fx: "
            f"{type(error).__name__}: {error}"
        ) from error


def _trace(model: nn.Module) -> tuple[nn.Module, fx.Graph]:
    tensors = (*model.parameters(), *model.buffers())
    model = copy.deepcopy(model, {id(t): t for t in tensors})
    if any(isinstance(m, Layer) for m in model.modules()):
        unconvert(model)
    model.eval()
    # What has a default is left at it: a proxy would be taken for a value that was given.
    parameters = inspect.signature(model.forward).parameters.values()
    empty = inspect.Parameter.empty
    defaults = {p.name: p.default for p in parameters if p.default is not empty}
    return model, _Tracer().trace(model, defaults)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        timm: Any = sys.modules.get("timm.layers._fx")
        functions = timm.get_notrace_functions() if timm else ()
        super().__init__(autowrap_functions=tuple(f for f in functions if callable(f)))
        self._whole = set(timm.get_notrace_modules() if timm else ())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            original_class(m) in self._whole
            or isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))  # subclasses too
            or layer_kind(m) is not None
            or super().is_leaf_module(m, module_qualified_name)
        )
