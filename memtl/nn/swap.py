"""Changing one instance's class, and changing it back."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


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
    return type(original.__name__, (mixin, original), namespace)


def _made_of(cls: Any) -> tuple[type, ...]:
    """The original class, and the mixins in front of it in the order in which they came."""
    if "memtl_original" not in vars(cls):
        return (cls,)
    return (*_made_of(cls.memtl_original), cls.memtl_layer)


def _rebuild(original: type, *mixins: type) -> nn.Module:
    return object.__new__(_in_front(original, *mixins))


def _in_front(original: type, *mixins: type) -> type:
    """``original`` with the mixins in front of it, the last one foremost."""
    return functools.reduce(lambda cls, mixin: swapped_class(mixin, cls), mixins, original)


def swap(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """Make ``module`` run ``mixin.forward``; the attributes, which the mixin annotates, are set on
    the instance."""
    original: type = type(module)
    module.__class__ = swapped_class(mixin, original)
    for name, value in attributes.items():
        setattr(module, name, value)


def swap_innermost(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """:func:`swap`, but directly in front of the module's own class, behind every other mixin."""
    original, *mixins = _made_of(type(module))
    module.__class__ = _in_front(original, mixin, *mixins)
    for name, value in attributes.items():
        setattr(module, name, value)


def unswap_innermost(module: nn.Module, mixin: type) -> None:
    """Undo :func:`swap_innermost`, whatever came in front or behind since."""
    original, *mixins = _made_of(type(module))
    mixins.remove(mixin)
    module.__class__ = _in_front(original, *mixins)
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
    return _made_of(type(module))[1:]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before any :func:`swap`."""
    return _made_of(type(module))[0]


def unswap(module: nn.Module) -> None:
    """Give ``module`` the class back that it had before the last :func:`swap`."""
    mixin = type(module).memtl_layer  # type: ignore[attr-defined]
    module.__class__ = type(module).memtl_original  # type: ignore[attr-defined]
    _forget(module, mixin)


def _forget(module: nn.Module, mixin: type) -> None:
    """Drop the attributes that ``mixin`` annotates."""
    for cls in mixin.__mro__:
        for name in vars(cls).get("__annotations__", {}):
            module.__dict__.pop(name, None)
