"""Functions called inside a module: ``F.conv2d(...)``, ``x * gate``, ``x.softmax(-1)``.

A module whose own code calls such functions gets :class:`CallsLayer` in front of its class: torch's
own layers, whose forward is one call, as well as attention and gates as models write them. While
its forward runs, a ``TorchFunctionMode`` (thread-local, left when the forward returns) hands the
calls to :mod:`memtl.functional`. No global name is touched, and other modules are unaffected.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..storage import Format
from .layers import Layer, alone
from .table import CALLS, Call

Formats = dict[str, Format]


def _without_dispatch(function: Any) -> Callable:
    """A copy of a function of torch.nn.functional that does not offer itself to modes first."""
    namespace = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__
    )
    return functools.update_wrapper(copy, function)


# torch's own multi-head attention; what it calls in turn goes through the mode.
_multi_head_attention_forward = _without_dispatch(F.multi_head_attention_forward)


class Tap(TorchFunctionMode):
    """While active, every call of ``F.scaled_dot_product_attention``, of converted modules too, is
    offered to :meth:`attention` first: what a method that reads a model's attention derives from.
    """

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        """The result, or NotImplemented for that of the call itself."""
        raise NotImplementedError

    def __enter__(self):
        _taps.active.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _taps.active.pop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            result = self.attention(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class _Taps(threading.local):
    """The active taps, the innermost last."""

    def __init__(self) -> None:
        self.active: list[Tap] = []


_taps = _Taps()


class FunctionFormats(TorchFunctionMode):
    """While active, calls in ``calls`` keep what they keep in the formats given by role."""

    def __init__(self, formats: Formats, calls: frozenset[Callable]):
        super().__init__()
        self.formats = formats
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Without gradients nothing is kept: so in memtl's own forwards and, under torch.compile, in
        # their backwards, which are traced while the mode is active.
        if func in self.calls and torch.is_grad_enabled():
            if func is F.multi_head_attention_forward:
                with self:
                    return _multi_head_attention_forward(*args, **kwargs)
            if func is F.scaled_dot_product_attention:
                # Served here, it would not reach the modes outside this one.
                for tap in reversed(_taps.active):
                    result = tap.attention(*args, **kwargs)
                    if result is not NotImplemented:
                        return result
            call = CALLS[func]
            if call.role in self.formats and _served(*args, *kwargs.values()):
                result = _serve(call, self.formats[call.role], *args, **kwargs)
                if result is not NotImplemented:
                    return result
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # under a mode torch 2.11 does not trace the method
        return func(*args, **kwargs)


@alone
def _serve(call: Call, format: Format, *args: Any, **kwargs: Any) -> Any:
    """Its result, or NotImplemented."""
    return call.serve(format, *args, **kwargs)


def _served(*arguments: Any) -> bool:
    """Whether memtl's functions take these: torch's also know integers, complex and sparse."""
    return all(
        t.layout == torch.strided and (t.is_floating_point() or t.dtype == torch.bool)
        for t in arguments
        if isinstance(t, Tensor)
    )


def _idle(module: Any) -> bool:
    """Whether it drops nothing, as most dropout in pre-trained models, and gives back its input."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and not (module.training and module.p)


class CallsLayer(Layer):
    """In front of a module that calls functions of :data:`CALLS` in its own code."""

    role = "attention"
    memtl_formats: Formats
    memtl_calls: frozenset[Callable]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or _idle(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with FunctionFormats(self.memtl_formats, self.memtl_calls):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
