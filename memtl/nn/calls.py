"""Functions called inside a module: attention written as ``F.scaled_dot_product_attention(...)``.

A module that calls such a function in its own code gets :class:`CallsLayer` in front of its class.
While its forward runs, a ``TorchFunctionMode`` (thread-local, left when the forward returns) hands
the calls to :mod:`memtl.functional`. No global name is touched, and other modules are unaffected.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import functional
from ..storage import Format
from .layers import Layer, forward_owner

Formats = dict[str, Format]


# Each takes the arguments of the functions it stands for, and answers NotImplemented to those that
# are to stay torch's: in place, into `out`, along a named dimension.


def _softmax(format: Format, input, dim=None, dtype=None, **rest):
    if rest or not isinstance(dim, int):
        return NotImplemented
    return functional.softmax(input, dim, dtype, format=format)


def _functional_softmax(format: Format, input, dim=None, _stacklevel=3, dtype=None):
    return _softmax(format, input, dim, dtype)


def _attention(format: Format, *args, **kwargs):
    return functional.scaled_dot_product_attention(*args, **kwargs, format=format)


def _linear(format: Format, input, weight, bias=None):
    return functional.linear(input, weight, bias, format=format)


def _gelu(format: Format, input, *, approximate="none"):
    return functional.gelu(input, approximate, format=format)


def _silu(format: Format, input, inplace=False):
    return NotImplemented if inplace else functional.silu(input, format=format)


def _relu(format: Format, input, inplace=False):
    return NotImplemented if inplace else functional.relu(input)


def _dropout(format: Format, input, p=0.5, training=True, inplace=False):
    return NotImplemented if inplace else functional.dropout(input, p, training)


def _matmul(format: Format, input, other=None, *, mat2=None, **rest):
    other = mat2 if other is None else other
    if rest or not isinstance(other, Tensor):
        return NotImplemented
    return functional.matmul(input, other, format=format)


def _without_dispatch(function: Any) -> Callable:
    """A copy of a function of torch.nn.functional that does not offer itself to modes first."""
    namespace = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__
    )
    return functools.update_wrapper(copy, function)


# torch's own multi-head attention; what it calls in turn goes through the mode.
_multi_head_attention_forward = _without_dispatch(F.multi_head_attention_forward)

CALLS: dict[Callable, tuple[str, Callable]] = {
    F.scaled_dot_product_attention: ("attention", _attention),
    F.softmax: ("attention", _functional_softmax),
    torch.softmax: ("attention", _softmax),
    Tensor.softmax: ("attention", _softmax),
    torch.matmul: ("attention", _matmul),
    torch.bmm: ("attention", _matmul),
    Tensor.matmul: ("attention", _matmul),
    Tensor.bmm: ("attention", _matmul),
    F.linear: ("linear", _linear),
    F.gelu: ("activation", _gelu),
    F.silu: ("activation", _silu),
    F.relu: ("activation", _relu),
    torch.relu: ("activation", _relu),
    F.dropout: ("activation", _dropout),
}
"""Function -> the role whose format it takes, and what is called in its place."""

_METHODS = {"softmax": Tensor.softmax, "matmul": Tensor.matmul, "bmm": Tensor.bmm}


class FunctionFormats(TorchFunctionMode):
    """While active, calls in ``table`` keep what they keep in the formats given by role."""

    def __init__(self, formats: Formats, calls: frozenset[Callable]):
        super().__init__()
        self.formats = formats
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.calls:
            if func is F.multi_head_attention_forward:
                with self:
                    return _multi_head_attention_forward(*args, **kwargs)
            role, replacement = CALLS[func]
            if role in self.formats and _served(*args, *kwargs.values()):
                result = replacement(self.formats[role], *args, **kwargs)
                if result is not NotImplemented:
                    return result
        return func(*args, **kwargs)


def _served(*arguments: Any) -> bool:
    """Whether memtl's functions take these: torch's also know integers, complex and sparse."""
    return all(
        t.layout == torch.strided and (t.is_floating_point() or t.dtype == torch.bool)
        for t in arguments
        if isinstance(t, Tensor)
    )


class CallsLayer(Layer):
    """In front of a module that calls functions of :data:`CALLS` in its own code."""

    role = "attention"
    memtl_formats: Formats
    memtl_calls: frozenset[Callable]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with FunctionFormats(self.memtl_formats, self.memtl_calls):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


# nn.MultiheadAttention calls one function, whose body calls the rest.
_MULTI_HEAD = frozenset(CALLS) | {F.multi_head_attention_forward}


def calls_of(module: nn.Module) -> frozenset[Callable]:
    """The functions of :data:`CALLS` that the module's own code calls."""
    owner = forward_owner(type(module))
    if owner is nn.MultiheadAttention:
        return _MULTI_HEAD
    return _class_calls(type(module))  # type: ignore[arg-type]


@functools.cache
def _class_calls(cls: type[nn.Module]) -> frozenset[Callable]:
    if cls.__module__.startswith("torch.nn.modules"):
        return frozenset()  # containers and layers of torch itself call one function each
    found: set[Callable] = set()
    pending, seen = [forward_owner(cls).__dict__["forward"]], set()
    while pending:
        function = pending.pop()
        if isinstance(function, types.FunctionType) and function not in seen:
            seen.add(function)
            calls, methods = _function_calls(function, depth=2)
            found |= calls
            pending += [getattr(cls, name, None) for name in methods]
    return frozenset(found)


def _function_calls(function: types.FunctionType, depth: int) -> tuple[set[Callable], set[str]]:
    """Read the byte code: the known functions it names, also through plain helper functions, and
    the attributes it takes of ``self``."""
    found: set[Callable] = set()
    methods: set[str] = set()
    value: Any = None  # what the last instructions put on the stack, as far as it is a global
    on_self = False
    function = _unwrap(function)
    for step in dis.get_instructions(function):
        if step.opname.startswith("LOAD_GLOBAL"):
            value, on_self = function.__globals__.get(step.argval), False
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if on_self:
                methods.add(step.argval)
                value, on_self = None, False
            elif isinstance(value, types.ModuleType):
                value = getattr(value, step.argval, None)
            else:
                value = _METHODS.get(step.argval) if value is None else None
        elif step.opname.startswith("LOAD_FAST"):
            # Python 3.13 loads two at once.
            name = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            value, on_self = None, name == "self"
            continue
        elif step.opname in ("BINARY_OP", "BINARY_MATRIX_MULTIPLY"):
            matmul = step.opname == "BINARY_MATRIX_MULTIPLY" or step.argrepr == "@"
            value, on_self = (Tensor.matmul if matmul else None), False  # as modes see it
        else:
            value, on_self = None, False
            continue
        if type(value).__name__ == "AttentionInterface":  # transformers' table of attentions
            found.add(F.scaled_dot_product_attention)
        elif callable(value) and value.__hash__ is not None and value in CALLS:
            found.add(value)
        elif isinstance(value, types.FunctionType) and depth > 0:
            if not value.__module__.startswith("torch."):
                found |= _function_calls(value, depth - 1)[0]
    return found, methods


def _unwrap(function: types.FunctionType) -> types.FunctionType:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
