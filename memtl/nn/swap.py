"""Changing one instance's class, and changing it back."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

HIDDEN = "the forward of this {} was replaced on the instance (by accelerator.prepare, say)"


@functools.cache
def swapped_class(mixin: type, original: type) -> type:
    """``original`` with ``mixin`` in front: same name, same module, one class per pair."""

    def reduce(self: nn.Module, protocol: Any) -> tuple:
        # A class made at run time cannot be found by its name: copying and pickling go through what
        # made it.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # 3.10
        return _rebuild, _made_of(type(self)), state

    def new(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
        # Who makes another layer of a layer's class (peft, of a convolution's) wants its own class.
        return original(*args, **kwargs)

    namespace = {
        "__new__": new,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        "memtl_original": original,
        "memtl_layer": mixin,
    }
    if (forward := getattr(mixin, "forward", None)) is not None and _takes_anything(forward):
        namespace["forward"] = _signed(forward, original.forward)  # type: ignore[attr-defined]
    return type(original.__name__, (mixin, original), namespace)


def _takes_anything(function: Callable) -> bool:
    kinds = (p.kind for p in inspect.signature(function).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def _signed(function: Any, original: Callable) -> Callable:
    """``function`` under the signature of ``original``: trainers read from a model's forward which
    columns of the data, and which options, it takes."""
    code, closure = function.__code__, function.__closure__
    name, defaults = function.__name__, function.__defaults__
    copy: Any = types.FunctionType(code, function.__globals__, name, defaults, closure)
    copy.__signature__ = inspect.signature(original)
    copy.__doc__ = original.__doc__  # but no __wrapped__: accelerate would unwrap it
    return copy


def _made_of(cls: Any) -> tuple[type, ...]:
    """The original class, and what came in front of it, in that order: mixins, and classes that
    others made of ours at run time (``fully_shard``), which stand for themselves."""
    if "memtl_original" in vars(cls):
        return (*_made_of(cls.memtl_original), cls.memtl_layer)
    ours = next((base for base in cls.__bases__ if hasattr(base, "memtl_original")), None)
    return (cls,) if ours is None else (*_made_of(ours), cls)


def _is_mixin(cls: type) -> bool:
    return not issubclass(cls, nn.Module)


def _rebuild(original: type, *front: type) -> nn.Module:
    return object.__new__(_in_front(original, *front))


def _in_front(original: type, *front: type) -> type:
    """``original`` with what :func:`_made_of` says in front of it, the last one foremost."""
    for cls in front:
        original = swapped_class(cls, original) if _is_mixin(cls) else _made_again(cls, original)
    return original


@functools.cache
def _made_again(cls: type, original: type) -> type:
    """A class that somebody made of one of ours, made of ``original``."""
    bases = (original if hasattr(base, "memtl_original") else base for base in cls.__bases__)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(bases), own)


def _bound_forwards(module: nn.Module) -> list[str]:
    """The attributes of this instance that are its class's forward, bound: accelerate's hooks call
    ``_old_forward``; Lightning leaves ``forward`` behind."""
    own = type(module).forward
    names = ("forward", "_old_forward")
    return [n for n in names if getattr(vars(module).get(n), "__func__", None) is own]


def hides_forward(module: nn.Module) -> bool:
    """Whether this instance has a forward of its own, which goes past its class's."""
    return "forward" in vars(module) and not _bound_forwards(module)


def _become(module: nn.Module, cls: type) -> None:
    bound = _bound_forwards(module)
    module.__class__ = cls
    for name in bound:
        vars(module)[name] = types.MethodType(cls.forward, module)  # type: ignore[attr-defined]


def swap(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """Make ``module`` run ``mixin.forward``; the attributes, which the mixin annotates, are set on
    the instance.

    Raises:
        ValueError: ``mixin`` has a forward, which a forward of the instance's own would hide.
    """
    original: type = type(module)
    if hasattr(mixin, "forward") and hides_forward(module):
        raise ValueError(f"{HIDDEN.format(original.__name__)}: apply memtl before that is done")
    _become(module, swapped_class(mixin, original))
    for name, value in attributes.items():
        setattr(module, name, value)


def swap_innermost(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """:func:`swap`, but directly in front of the module's own class, behind every other mixin."""
    original, *front = _made_of(type(module))
    _become(module, _in_front(original, mixin, *front))
    for name, value in attributes.items():
        setattr(module, name, value)


def unswap_innermost(module: nn.Module, mixin: type) -> None:
    """Undo :func:`swap_innermost`, whatever came in front or behind since."""
    original, *front = _made_of(type(module))
    front.remove(mixin)
    _become(module, _in_front(original, *front))
    _forget(module, mixin)


def without(cls: type, mixin: type) -> type:
    """A swapped class without the mixins in front of it that derive from ``mixin``."""
    original, *mixins = _made_of(cls)
    return _in_front(original, *(m for m in mixins if not issubclass(m, mixin)))


def is_swapped(module: nn.Module) -> bool:
    """Whether memtl changed this instance's class."""
    return hasattr(type(module), "memtl_original")


def swapped_in(module: nn.Module) -> tuple[type, ...]:
    """The mixins in front of this instance's own class, the innermost first."""
    return tuple(cls for cls in _made_of(type(module))[1:] if _is_mixin(cls))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before any :func:`swap`."""
    return _made_of(type(module))[0]


def unswap(module: nn.Module) -> None:
    """Take back the last :func:`swap`; what others made of the class since, it still is."""
    original, *front = _made_of(type(module))
    mixin = swapped_in(module)[-1]
    del front[len(front) - 1 - front[::-1].index(mixin)]
    _become(module, _in_front(original, *front))
    _forget(module, mixin)


def _forget(module: nn.Module, mixin: type) -> None:
    """Drop the attributes that ``mixin`` annotates."""
    for cls in mixin.__mro__:
        for name in vars(cls).get("__annotations__", {}):
            module.__dict__.pop(name, None)
