"""What is done to a network, as a file or a command line says it: methods by name, and LoRA."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..methods import Config
from ..methods.base.config import METHODS, config_from_dict
from .lora import LoRA

FULL = "full"
"""The method that changes nothing: every parameter trains."""


def scalar(text: str) -> bool | int | float | str | None:
    """What a word of a command line, or of YAML, means (YAML itself takes 1e-3 for a string)."""
    named = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on a name that is unknown: which one it may have been."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f": did you mean {near[0]!r}?" if near else ""


def methods(value: Any) -> tuple[Config, ...]:
    """The configurations of a name, of several with commas, of a mapping, or of a list of these.

    Raises:
        TypeError, ValueError: a name or an option is unknown (the nearest one is said), or a value
            is wrong.
    """
    return tuple(config for each in _several(value) if (config := _method(each)) is not None)


def lora(value: Any) -> LoRA | None:
    """LoRA as its rank, or a mapping with its options; true is the usual rank, none and false none.

    Raises:
        TypeError, ValueError: as :func:`methods`.
    """
    value = scalar(value) if isinstance(value, str) else value
    if value is None or value is False or isinstance(value, LoRA):
        return value or None
    fields = dict(value) if isinstance(value, Mapping) else {} if value is True else {"rank": value}
    known = [field.name for field in dataclasses.fields(LoRA)]
    for name in fields:
        if name not in known:
            raise ValueError(f"lora has no option {name!r}{nearest(name, known)}")
    read: dict[str, Any] = {k: scalar(v) if isinstance(v, str) else v for k, v in fields.items()}
    return LoRA(**read)


def with_option(setting: str, given: Any, option: str, text: str) -> Any:
    """``given``, the value of a setting that has options, with one of them: ``lora.alpha=16``,
    ``method.keep=0.1``, or ``method.checkpoint.bits=4`` where several methods have one of that
    name.

    Raises:
        ValueError: none of several methods has the option, or more than one.
    """
    if setting == "lora":
        given = scalar(given) if isinstance(given, str) else given
        start = {} if given in (None, True, False) else {"rank": given}
        return (dict(given) if isinstance(given, Mapping) else start) | {option: text}
    given = FULL if given is None else given
    several = [
        dict(each) if isinstance(each, Mapping) else {"method": each} for each in _several(given)
    ]
    name, dot, behind = option.rpartition(".")
    if dot:
        chosen, option = [each for each in several if _name(each) == name], behind
    else:
        chosen = several if len(several) == 1 else [e for e in several if option in _options(e)]
    if len(chosen) != 1:
        names = ", ".join(str(_name(each)) for each in several)
        what = f"several of {names} have" if chosen else f"none of {names} has"
        hint = f": method.NAME.{option}=... says which" if chosen else ""
        raise ValueError(f"method.{f'{name}.' * bool(dot)}{option}: {what} it{hint}")
    chosen[0][option] = text
    return several


def overview() -> str:
    """Every method, a line each, by the networks that it is for."""
    kinds: dict[str, list[str]] = {"any network": []}
    for name, cls in sorted(METHODS.items()):
        module: Any = sys.modules[cls.__module__]
        about = (module.__doc__ or "").partition("\n")[0]
        if presets := getattr(module, "PRESETS", ()):
            about += f" Presets: {', '.join(presets)}"
        kinds.setdefault(cls.networks, []).append(f"    {name.replace('_', '-'):14} {about}")
    kinds["any network"].insert(0, f"    {FULL:14} Every parameter trains; nothing is changed.")
    return "\n".join(f"  {kind}:\n" + "\n".join(lines) for kind, lines in kinds.items())


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    if isinstance(value, (list, tuple)):
        return [part for each in value for part in _several(each)]
    return [value]


def _name(method: Mapping[str, Any]) -> Any:
    name = method.get("method")
    return name.replace("-", "_") if isinstance(name, str) else name


def _options(method: Mapping[str, Any]) -> set[str]:
    cls: Any = METHODS.get(_name(method))
    if cls is None:
        return set()
    return {field.name for field in dataclasses.fields(cls)} | (
        {"preset"} if hasattr(cls, "preset") else set()
    )


def _method(value: Any) -> Config | None:
    if isinstance(value, Config):
        return value
    fields = dict(value) if isinstance(value, Mapping) else {"method": value}
    name = fields.pop("method", None)
    if not isinstance(name, str):
        raise TypeError(f"method must be a name, or a mapping with one as `method`, got {value!r}")
    name = name.replace("-", "_")
    if name in (FULL, "none"):
        if fields:
            raise ValueError(f"method {FULL!r} has no options, got {sorted(fields)}")
        return None
    if name == "lora":
        raise ValueError("lora is a setting of its own, and methods go on top: --lora 8")
    if name not in METHODS:
        raise ValueError(
            f"unknown method {name!r}{nearest(name, [FULL, *METHODS])} "
            f"(there are {', '.join([FULL, *sorted(METHODS)])})"
        )
    options = {k: scalar(v) if isinstance(v, str) else v for k, v in fields.items()}
    if "preset" in options:
        cls: Any = METHODS[name]
        if not hasattr(cls, "preset"):
            raise ValueError(f"method {name!r} has no presets")
        preset = cls.preset(options.pop("preset"))
        options = {k: v for k, v in preset.to_dict().items() if k != "method"} | options
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"method {name!r} has no option {option!r}{nearest(option, known)}")
    return config_from_dict({"method": name, **options})
