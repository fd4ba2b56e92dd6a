"""Which tensors can be had from what is already kept for backward: each state is kept once.

A Function says with :func:`offer` how its output, or an input that it has just packed, can be made
from what it keeps; whoever needs that tensor, or a view of it, finds it with :func:`shared` and
keeps the same tensors again, at no cost, instead of a copy. What is offered is tied to the tensor
object, to its version and to those of what it is made from: a change in place ends it, and so does
any operation memtl does not know.

Shared are results inside one graph alone, never leaves: parameters, inputs and buffers outlive a
step, and may change unseen (through ``.data``, by a fused optimizer, a collective). Nothing is
shared where other saved-tensor hooks are at work, which account for every tensor one by one
(torch's checkpointing drops and repeats them), nor under ``torch.compile``, where the tensors of
one traced Function cannot be handed to another by the side.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..storage import Dense, Format, Packed
from ..storage.rebuilt import View, laid, rebuilt
from . import region


class _Offer(NamedTuple):
    packed: Packed
    version: int
    versions: tuple[int, ...]  # of the packed tensors


_T = TypeVar("_T")


class _ByTensor(Generic[_T]):
    """Values by tensor object, for as long as it lives. torch's WeakTensorKeyDictionary does the
    same, but hashes and compares in Python: several times as long, at every call of a layer."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], _T]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, t: Tensor, value: _T) -> None:
        key, entries = id(t), self._entries
        entries[key] = weakref.ref(t, lambda _: entries.pop(key, None)), value

    def get(self, t: Tensor) -> _T | None:
        entry = self._entries.get(id(t))
        return entry[1] if entry is not None and entry[0]() is t else None


_offers: _ByTensor[_Offer] = _ByTensor()
_origins: _ByTensor[TensorWeakRef] = _ByTensor()  # what autocast made of a tensor -> that tensor
_CODED = 8  # bits up to which the rounding to bfloat16 is nothing beside that of the code


def offer(x: Tensor, packed: Packed | None, *, dirty: bool = False) -> None:
    """``packed`` stands for x from now on.

    ``dirty``: x is what a Function changes in place; autograd will count that change once more.
    """
    if packed is None or not sharing() or x.is_inference() or _wrapped(x, *packed.tensors):
        return
    if any(torch._C._is_alias_of(x, t) for t in packed.tensors):  # type: ignore[attr-defined]
        return  # by reference: it would keep itself alive
    offers, origins = _here()
    versions = _versions(packed.tensors)
    offers[x] = _Offer(packed, x._version + dirty, versions)
    origin = origins.get(x)
    if origin is None or packed.format.precision > _CODED:
        return
    if (wide := origin()) is not None:
        offers[wide] = _Offer(packed.to(wide.dtype), wide._version, versions)


def offer_input(x: Tensor, packed: Packed) -> None:
    """:func:`offer` for what a Function is given, which may be a leaf."""
    if not x.is_leaf:
        offer(x, packed)


def shared(x: Tensor, format: Format | None = None) -> Packed | None:
    """What stands for x, if ``format`` takes it: the very same format, or, where that is to be
    rebuilt, anything in as many bits. Without a format, whatever there is."""
    if x.is_leaf or not sharing() or _wrapped(x):
        return None
    found = offered(x)
    if found is None and x._base is not None and not x._base.is_leaf:
        found = _view(x, x._base)
    return found if found is None or format is None or _takes(format, found) else None


def _takes(format: Format, found: Packed) -> bool:
    if laid(found)[0].format == format:
        return True
    return format.rebuild and found.format.precision >= max(1, format.precision)


def offered(x: Tensor) -> Packed | None:
    """What stands for this very tensor."""
    found = _here()[0].get(x)
    if found is None or found.version != x._version or not _allocated(found.packed.tensors):
        return None
    return found.packed if found.versions == _versions(found.packed.tensors) else None


def _allocated(tensors: Iterable[Tensor]) -> bool:
    """Whether their memory is there. FSDP frees that of a norm's parameters, say, when its forward
    is over, and gathers them anew for the norm's own backward: after that of whoever read y."""
    return all(not t.numel() or t.untyped_storage().nbytes() for t in tensors)


def held(weight: Tensor) -> Packed:
    """A layer's weight as it is kept for the gradient of x: what it is made of, where that gives
    its every bit, else by reference.

    A weight made of constants is a leaf; what was offered for this very tensor stands for it.
    """
    found = offered(weight) if sharing() else None
    if found is not None and found.format.exact:
        return found
    return Packed(Dense(), (weight,), weight.shape, weight.dtype)


def _view(x: Tensor, base: Tensor) -> Packed | None:
    """What stands for a view of a tensor that something stands for."""
    if (packed := offered(base)) is None:
        return None
    offset = int(x.storage_offset() - base.storage_offset())
    alike = x.dtype == base.dtype and x.is_neg() == base.is_neg()
    if not alike or offset < 0 or _overlaps(base):
        return None
    view = View(x.shape, x.stride(), offset, base.stride())
    return rebuilt(view, packed, shape=x.shape, dtype=x.dtype)


def _overlaps(x: Tensor) -> bool:
    return any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))


def _here() -> tuple[_ByTensor[_Offer], _ByTensor[TensorWeakRef]]:
    """Offers and origins. A region that will be run again shares within each of its runs alone, so
    that both keep the same."""
    run = region.current()
    if run is None:
        return _offers, _origins
    if run.offers is None:
        run.offers = _ByTensor(), _ByTensor()
    return run.offers


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(-1 if t.is_inference() else t._version for t in tensors)


def _wrapped(*tensors: Tensor) -> bool:
    """Whether one is torch.func's: those have neither storage nor version of their own."""
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


def sharing() -> bool:
    """Whether anything is shared here and now."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None or getattr(hooks[0], "memtl_shares", False)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, for which stands what stands for x, and the other way round: autocast casts
    a tensor anew for each of its readers."""
    y = x.to(dtype)
    if y is x or x.is_leaf or not sharing():
        return y
    packed = shared(x)
    if packed is not None:
        offer(y, packed.to(dtype))
    elif dtype == torch.bfloat16:  # float16 may lose what float32 holds
        _here()[1][y] = TensorWeakRef(x)
    return y
