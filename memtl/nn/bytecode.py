"""Which functions a module's own code calls, read from its byte code."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import forward_owner
from .swap import original_class
from .table import CALLS, METHODS

# nn.MultiheadAttention calls one function, whose body calls the rest.
_MULTI_HEAD = frozenset(CALLS) | {F.multi_head_attention_forward}


def calls_of(module: nn.Module) -> frozenset[Callable]:
    """The functions of :data:`CALLS` that the module's own code calls, converted or not."""
    cls = original_class(module)
    if forward_owner(cls) is nn.MultiheadAttention:
        return _MULTI_HEAD
    return _class_calls(cls)  # type: ignore[arg-type]


@functools.cache
def _class_calls(cls: type[nn.Module]) -> frozenset[Callable]:
    found: set[Callable] = set()
    pending, seen = [forward_owner(cls).__dict__["forward"]], set()
    while pending:
        function = pending.pop()
        if isinstance(function, types.FunctionType) and function not in seen:
            seen.add(function)
            calls, methods = _function_calls(function, depth=2)
            found |= calls
            pending += [getattr(cls, name, None) for name in methods]
    if cls.__module__.startswith("torch.nn.modules"):
        found -= {Tensor.mul, Tensor.__pow__}  # of sizes
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
                value = METHODS.get(step.argval) if value is None else None
        elif step.opname.startswith("LOAD_FAST"):
            # Python 3.13 loads two at once.
            name = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            value, on_self = None, name == "self"
            continue
        elif step.opname.startswith("BINARY_"):  # as modes see it
            old = {"MATRIX_MULTIPLY": "@", "MULTIPLY": "*", "POWER": "**"}  # before Python 3.11
            symbol = old.get(step.opname.removeprefix("BINARY_"))
            operator = {"@": Tensor.matmul, "*": Tensor.mul, "**": Tensor.__pow__}
            value, on_self = operator.get(symbol or step.argrepr), False
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
