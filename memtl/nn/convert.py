"""convert() and unconvert(): every layer memtl knows, in place, with a report of what happened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..storage import Format
from . import standardized, sync  # noqa: F401 (they register layers)
from .bytecode import calls_of
from .calls import CallsLayer
from .layers import LAYERS, ROLES, Layer, forward_owner, layer_for
from .report import Report, Row, plain_name
from .swap import HIDDEN, hides_forward, swap, unswap
from .table import CALLS

Patterns = str | Sequence[str] | None

KEEPS_NOTHING = (nn.Identity, nn.Flatten, nn.Unflatten)


def convert(
    model: nn.Module,
    formats: Mapping[str, Format | None],
    *,
    target_modules: Patterns = None,
    exclude_modules: Patterns = None,
) -> Report:
    """Make every layer of ``model`` that memtl knows keep what its role's format says, in place.

    Only the class of each instance changes: ``isinstance``, ``state_dict`` keys, parameters, hooks
    and the forward's result stay as they were.

    Args:
        model: any module.
        formats: role ("linear", "convolution", "attention", "norm", "activation") -> format; a role
            that is absent or None is left alone.
        target_modules: None for all; a regular expression matched against whole module names; or
            names, each matching itself, whatever ends in ".name", and everything inside it.
        exclude_modules: the same, for what is to be left alone.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing could be converted, a pattern matches nothing, a role is unknown, or
            the model is already converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if unknown := sorted(set(formats) - set(ROLES)):
        raise ValueError(f"roles must be among {ROLES}, got {unknown}")
    modules = [(plain_name(name), module) for name, module in model.named_modules()]
    if done := sum(isinstance(module, Layer) for _, module in modules):
        raise ValueError(
            f"this model is already converted ({done} modules): memtl.unconvert(model) first"
        )
    names = [name for name, _ in modules]
    targeted = _matching(names, target_modules, "target_modules")
    excluded = _matching(names, exclude_modules, "exclude_modules") if exclude_modules else set()
    chosen = {role: format for role, format in formats.items() if format is not None}

    plan: list[tuple[nn.Module, type, dict]] = []
    rows: list[Row] = []
    for name, module in modules:
        kind = type(module).__name__
        if name in excluded or name not in targeted:
            if _is_leaf(module):
                rows.append(
                    Row(name, kind, reason="excluded" if name in excluded else "not targeted")
                )
            continue
        row, step = _plan(name, module, kind, chosen)
        if step is not None:
            plan.append((module, *step))
        if row is not None:
            rows.append(row)
    if not plan:
        raise ValueError(f"nothing to convert in {type(model).__name__}:\n{Report(tuple(rows))}")
    for module, mixin, attributes in plan:
        swap(module, mixin, **attributes)
    return Report(tuple(rows))


def _plan(name: str, module: nn.Module, kind: str, formats: Mapping[str, Format]):
    """What happens to one module: its row in the report, and mixin and attributes of the swap."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return Row(name, kind, reason="its parameters are not initialised yet"), None
    mixin = layer_for(module)
    if mixin is not None:
        if hides_forward(module):
            return Row(name, kind, reason=HIDDEN.format(kind)), None
        if (reason := mixin.refuses(module)) is not None:
            return Row(name, kind, reason=reason), None
        if mixin.role not in formats:
            return Row(name, kind, reason=f"no format is given for the role {mixin.role}"), None
        format = formats[mixin.role]
        row = Row(name, kind, mixin.role, mixin.describe(format))
        return row, (mixin, {"memtl_format": format})
    calls = calls_of(module)
    served = [CALLS[call] for call in calls if call in CALLS and CALLS[call].role in formats]
    leaf = _is_leaf(module)
    if served:
        if leaf and (dtype := _other_dtype(module)) is not None:
            return Row(name, kind, reason=f"computes in {dtype}"), None
        if hides_forward(module):
            return Row(name, kind, reason=HIDDEN.format(kind)), None
        attributes = {"memtl_formats": dict(formats), "memtl_calls": calls}
        return _calls_row(name, module, calls, served, formats), (CallsLayer, attributes)
    if leaf and calls:
        roles = ", ".join(sorted({CALLS[call].role for call in calls}))
        return Row(name, kind, reason=f"no format is given for the role {roles}"), None
    if not leaf or isinstance(module, KEEPS_NOTHING):
        return None, None
    return Row(name, kind, reason=_reason(module)), None


def _calls_row(name, module, calls, served, formats) -> Row:
    """The row of a module that is converted for the functions it calls."""
    roles = sorted({call.role for call in served})
    kept = dict.fromkeys(call.kept(formats[call.role]) for call in served)
    if len(kept) > 1:
        kept.pop("nothing", None)
    shown = ", ".join(kept)
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        shown = ", ".join(str(formats[role]) for role in roles)
        kind = f"{kind} calls multi_head_attention_forward"
    elif not type(module).__module__.startswith("torch.nn.modules"):
        names = {call.__name__ for call in calls if CALLS[call].role in formats}
        kind = f"{kind} calls {', '.join(sorted(names))}"
    return Row(name, kind, "/".join(roles), shown)


def _other_dtype(module: nn.Module) -> str | None:
    """A dtype of its parameters in which memtl does not compute."""
    for p in module.parameters(recurse=False):
        if not p.is_floating_point():
            return str(p.dtype)
    return None


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "keeps its integer indices only"
    for base in type(module).__mro__[1:]:
        if base is not nn.Module and base.__module__.startswith("torch.nn.modules"):
            if f"{base.__module__}.{base.__qualname__}" in LAYERS:
                return f"{forward_owner(type(module)).__name__} overrides {base.__name__}.forward"
    return "memtl has no layer for it"


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _matching(names: Iterable[str], patterns: Patterns, option: str) -> set[str]:
    names = list(names)
    if patterns is None:
        return set(names)
    if isinstance(patterns, str):
        found = {n for n in names if re.fullmatch(patterns, n)}
        if not found:
            raise ValueError(f"{option} {patterns!r} matches no module")
        return found
    found = set()
    for pattern in patterns:
        inside = re.compile(rf"(.*\.)?{re.escape(pattern)}(\..*)?")
        matched = {n for n in names if n and inside.fullmatch(n)}
        if not matched:
            raise ValueError(f"{option}: {pattern!r} matches no module")
        found |= matched
    return found


def unconvert(model: nn.Module) -> int:
    """Give every converted or checkpointed module its own class back; returns how many there were.

    Raises:
        ValueError: nothing in ``model`` is converted; or a method that changes the model was
            applied after the conversion, or the forward of a converted module replaced.
    """
    modules: Iterable[tuple[str, nn.Module]] = model.named_modules()
    converted = [(name, m) for name, m in modules if issubclass(type(m), Layer)]
    if not converted:
        raise ValueError(f"nothing in this {type(model).__name__} is converted")
    for name, module in converted:
        if not issubclass(type(module).memtl_layer, Layer):  # type: ignore[attr-defined]
            what = repr(name) if name else f"this {type(module).__name__}"
            raise ValueError(f"{what} was changed by a method after the conversion")
        if hides_forward(module):
            raise ValueError(f"{HIDDEN.format(type(module).__name__)}: undo that first")
    for _, module in converted:
        while issubclass(getattr(type(module), "memtl_layer", object), Layer):
            unswap(module)
    return len(converted)
