"""Blocks of which nothing is kept but the input, and the search for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..autograd.checkpointed import checkpointed
from ..storage import Format
from .layers import Layer
from .report import Report, Row, plain_name
from .swap import original_class, swap

Patterns = str | Sequence[str] | None

UNCOMPILED = "memtl: a checkpointed block runs uncompiled: use torch.compile without fullgraph=True"


class CheckpointedLayer(Layer):
    """In front of a block, converted or not: see :mod:`memtl.autograd.checkpointed`."""

    role = "block"
    memtl_input: Format

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        run = checkpointed
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=UNCOMPILED)
            run = torch.compiler.disable(run)
        return run(self, own, self.memtl_input, args, kwargs)  # type: ignore[arg-type]


def checkpoint_blocks(
    model: nn.Module, format: Format, *, target_modules: Patterns = None
) -> Report:
    """Let the blocks of ``model`` keep their input in ``format`` and nothing else, in place.

    Only the class of each instance changes, as in :func:`memtl.nn.convert`, which comes first where
    both are wanted: what a block keeps while backward runs it again is then what its layers keep.

    Args:
        model: any module.
        format: how the input is kept.
        target_modules: names of the blocks, or a regular expression that whole names match; None
            for the members of every ``ModuleList`` or ``Sequential`` of two or more modules of one
            class that hold others; of such lists within each other the innermost.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there are no such blocks, they lie within each other, or they are checkpointed
            already, by memtl or by the library.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, module in modules.items():
        if isinstance(module, CheckpointedLayer):
            raise ValueError(f"{name} is checkpointed already: memtl.unconvert(model) first")
        for flag in ("gradient_checkpointing", "grad_checkpointing"):
            if getattr(module, flag, False) is True:
                raise ValueError(
                    f"the library's own checkpointing is on ({name or 'the model'}.{flag}): it "
                    "would keep every block's input whole; switch it off"
                )
    names = _lists(modules) if target_modules is None else _named(modules, target_modules)
    if not names:
        raise ValueError(
            f"this {type(model).__name__} has no blocks: no list of modules of one class that hold "
            "others; name them in target_modules"
        )
    for name in names:
        if inside := [other for other in names if other.startswith(f"{name}." if name else "_")]:
            raise ValueError(f"{inside[0]} lies within {name}: one of them is to be checkpointed")
    for name in names:
        swap(modules[name], CheckpointedLayer, memtl_input=format)
    rows = [Row(n, type(modules[n]).__name__, "block", f"input {format}") for n in names]
    return Report(tuple(rows))


def _lists(modules: dict[str, nn.Module]) -> list[str]:
    lists = [name for name, module in modules.items() if _is_list_of_blocks(module)]
    innermost = [
        n for n in lists if not any(o.startswith(f"{n}." if n else "") and o != n for o in lists)
    ]
    return [
        f"{name}.{child}".lstrip(".")
        for name in innermost
        for child, _ in modules[name].named_children()
    ]


def _is_list_of_blocks(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
        return False
    (first, *others) = map(original_class, module)
    if any(cls is not first for cls in others) or issubclass(first, (nn.ModuleList, nn.Sequential)):
        return False
    return all(next(block.children(), None) is not None for block in module)


def _named(modules: dict[str, nn.Module], patterns: str | Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        found = [name for name in modules if name and re.fullmatch(patterns, name)]
        if not found:
            raise ValueError(f"target_modules {patterns!r} matches no module")
        return found
    if missing := [name for name in patterns if name not in modules or not name]:
        raise ValueError(f"target_modules: {missing[0]!r} is no module of this model")
    return list(dict.fromkeys(patterns))
