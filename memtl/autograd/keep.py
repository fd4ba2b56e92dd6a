"""The one call by which a Function keeps something for its backward.

Every Function goes through :func:`keep`, so that what is kept is decided, counted and, where a
tensor can be had from something already kept (:mod:`memtl.autograd.share`), answered in a single
place. All of it passes through
``save_for_backward``: memory accounting, checkpointing and version checks see it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..storage import Format, Packed
from ..storage.rebuilt import pack_as_laid
from . import region
from .share import offer_input, shared


class Function(torch.autograd.Function):
    """What memtl's Functions derive from.

    torch binds the arguments to the signature of ``forward`` at every call, to fill in defaults;
    that takes longer than everything else it does. Here there are none: arguments stay as they are.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.forward).parameters.values())
        if any(p.default is not p.empty for p in parameters):
            raise TypeError(
                f"{cls.__name__}.forward: every argument must be given, none by default"
            )
        cls.forward.__signature__ = _Given(parameters)  # type: ignore[attr-defined]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """What is kept of a batch is packed as one; torch.func.vmap would have to take it apart."""
        raise RuntimeError(
            "memtl: torch.func.vmap does not go through layers that keep their own way for "
            "backward: call memtl.unconvert(model) first, or vmap under torch.no_grad()"
        )


class _Given(inspect.Signature):
    """A signature whose binding gives back what it is given."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args, kwargs)


class _Bound(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


def keep(
    ctx, *pairs: tuple[Tensor | Packed | None, Format], exact: tuple[Tensor | None, ...] = ()
) -> list[Packed | None]:
    """Save each tensor of ``pairs`` in its format (None: nothing; a ``Packed`` is in it already),
    and those of ``exact`` as is. Returns what now stands for each of ``pairs``."""
    saved = list(exact)
    kept: list[Packed | None] = []
    specs: list[tuple | None] = []
    for x, format in pairs:
        if x is None:
            specs.append(None)
            kept.append(None)
            continue
        packed = x if isinstance(x, Packed) else packed_once(x, format)
        kept.append(packed)
        specs.append((packed.format, packed.shape, packed.dtype, len(packed.tensors)))
        saved.extend(packed.tensors)
    ctx.specs = tuple(specs)
    ctx.num_exact = len(exact)
    region.keeps(saved, ctx.specs)
    ctx.save_for_backward(*saved)
    return kept


def packed_once(x: Tensor, format: Format) -> Packed:
    """What stands for x already, or x packed, which then does."""
    packed = shared(x, format)
    if packed is None:
        packed = pack_as_laid(x, format)
        offer_input(x, packed)
    return packed


def kept(ctx) -> tuple[list[Any], tuple[Any, ...]]:
    """What :func:`keep` saved, in the order given: a ``Packed`` or None for each pair, and the
    exact tensors."""
    saved = ctx.saved_tensors
    start = ctx.num_exact
    packed: list[Any] = []
    for spec in ctx.specs:
        if spec is None:
            packed.append(None)
            continue
        format, shape, dtype, count = spec
        packed.append(Packed(format, tuple(saved[start : start + count]), shape, dtype))
        start += count
    return packed, tuple(saved[: ctx.num_exact])


def constant(ctx, *outputs: Tensor) -> None:
    """These outputs have no gradient, nor are zeros made in its place: backward is given None."""
    ctx.mark_non_differentiable(*outputs)
    if not torch.compiler.is_compiling():  # not traced, and what is unread is not made
        ctx.set_materialize_grads(False)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, for what a forward returns, and no call where there is nothing to do:
    compiled by torch 2.11, a result that has two names in its forward gets a gradient of zeros."""
    return x if x.dtype == dtype else x.to(dtype)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For every ``backward``: it runs in the dtypes it was given, an autocast region around it or
    not, and a second derivative through it is refused, whoever asks for it.

    ``once_differentiable`` refuses only where grad_out needs a gradient; elsewhere it hands out
    gradients as constants, and a gradient penalty would silently lose its term.
    """

    def once(ctx, *grads):
        if grads[0] is None:  # nor has the output itself: see `constant`
            return (None,) * len(ctx.needs_input_grad)
        device = grads[0].device.type
        if not torch.is_autocast_enabled(device) and not torch.is_grad_enabled():
            return backward(ctx, *grads)  # the rule; what is below costs as much again
        with torch.no_grad(), torch.autocast(device, enabled=False):
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        refuse = torch._C._functions.DelayedError(
            b"memtl: what is kept for backward does not determine a second derivative",
            len(outputs),
        )
        return refuse(*map(_leaf, outputs))  # type: ignore[arg-type]

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        if torch.compiler.is_compiling():
            return once(ctx, *grads)
        try:  # what is exact mostly consists of operators that know of batches of gradients
            return once(ctx, *grads)
        except RuntimeError as error:
            if not any(_batched(g) for g in grads if g is not None):
                raise
            raise RuntimeError(
                "memtl: gradients from what is kept are not computed several at a time "
                "(is_grads_batched, torch.func.jacrev): ask for one after the other, or call "
                "memtl.unconvert(model) first"
            ) from error

    return wrapper


def _batched(t: Tensor) -> bool:
    """Whether t stands for a batch, torch.func's or that of ``is_grads_batched``."""
    return "Batched" in str(torch._C._dispatch_keys(t))  # the latter's key has no name in Python


def _leaf(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    t = t.detach()
    t.requires_grad = True  # the method requires_grad_() is refused inside torch.func transforms
    return t


class Blank(NamedTuple):
    """The layout of a tensor that is not kept, for operators that are given it and whose result
    depends on no element of it."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: Tensor) -> Blank:
        return cls(t.shape, t.stride(), t.dtype, t.device)

    def make(self, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of that layout, uninitialised; torch's deterministic mode fills it."""
        dtype = dtype or self.dtype
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=self.device)


def is_parameter(t: Tensor) -> bool:
    """Whether t is a parameter or a view of one: there anyway, whoever keeps it."""
    if isinstance(t, torch.nn.Parameter):
        return True
    # Under torch.compile views have no base to ask for.
    return not torch.compiler.is_compiling() and isinstance(t._base, torch.nn.Parameter)
