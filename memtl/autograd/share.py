"""Which tensors can be had from what is already kept for backward: each state is kept once.

A Function says with :func:`offer` how its output, or an input that it has just packed, can be made
from what it keeps; whoever needs that tensor, or a view of it, finds it with :func:`shared` and
keeps the same tensors again, at no cost, instead of a copy. What is offered is tied to the tensor
object and to its version: a change in place ends it, and so does any operation memtl does not know.

Under ``torch.compile`` nothing is offered: tensors of one traced Function cannot be handed to
another by the side.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..storage import Format, Packed
from ..storage.rebuilt import View, rebuilt

_offers = WeakTensorKeyDictionary()  # tensor -> (its version, Packed)
_origins = WeakTensorKeyDictionary()  # what autocast made of a tensor -> that tensor
_CODED = 8  # bits up to which the rounding of a cast is nothing beside that of the code


def offer(x: Tensor, packed: Packed | None, *, dirty: bool = False) -> None:
    """``packed`` stands for x from now on.

    ``dirty``: x is what a Function changes in place; autograd will count that change once more.
    """
    if packed is None or torch.compiler.is_compiling():
        return
    if any(t is x for t in packed.tensors):  # by reference: it would keep itself alive
        return
    _offers[x] = (x._version + dirty, packed)
    origin = _origins.get(x, lambda: None)()
    if origin is not None and packed.format.precision <= _CODED:
        _offers[origin] = (origin._version, dataclasses.replace(packed, dtype=origin.dtype))


def shared(x: Tensor, format: Format | None = None) -> Packed | None:
    """What stands for x, if ``format`` takes it: the very same format, or, where that is to be
    rebuilt, anything as fine. Without a format, whatever there is."""
    if torch.compiler.is_compiling():
        return None
    found = offered(x)
    if found is None and x._base is not None:
        base = offered(x._base)
        if base is not None:
            view = View(x.shape, x.stride(), int(x.storage_offset()), x._base.stride())
            found = rebuilt(view, base, shape=x.shape, dtype=x.dtype)
    return found if found is None or format is None or _takes(format, found) else None


def _takes(format: Format, found: Packed) -> bool:
    if found.format == format:
        return True
    return format.rebuild and found.format.precision >= format.precision


def offered(x: Tensor) -> Packed | None:
    """What stands for this very tensor."""
    version, packed = _offers.get(x, (None, None))
    return packed if version == x._version else None


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, for which stands what stands for x, and the other way round: autocast casts
    a tensor anew for each of its readers."""
    y = x.to(dtype)
    if y is x or torch.compiler.is_compiling():
        return y
    packed = shared(x)
    if packed is not None:
        offer(y, dataclasses.replace(packed, dtype=dtype))
    else:
        _origins[y] = TensorWeakRef(x)
    return y
