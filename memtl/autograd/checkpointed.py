"""Checkpointing: of a block nothing is kept but its input, in few bits; backward runs it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from ..storage import Dense, Format, Packed
from ..storage.order import memory_order, unpermuted
from .keep import Function, is_parameter, keep, kept
from .region import Region


def checkpointed(
    module: nn.Module,
    forward: Callable[..., Any],
    format: Format,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``forward(*args, **kwargs)``, the forward of ``module``, for which its input is kept in
    ``format``: the first tensor, and all that need a gradient. Other arguments (masks, positions,
    flags) are kept as they are, by reference.

    Gradients are those of the block at the input that was kept; what passes by it (a residual
    connection) is exact. The second run sees the random numbers and the autocast of the first, and
    leaves running statistics as they are. ``torch.compile`` leaves the block uncompiled.

    Memory: ``format.nbytes`` of the input.

    Raises:
        ValueError: an argument is a cache of keys and values, which a second run would extend.
    """
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    needs = any(t.requires_grad for t in (*tensors, *module.parameters()))
    if not needs or torch._C._are_functorch_transforms_active():
        return forward(*args, **kwargs)
    if any(hasattr(leaf, "get_seq_length") for leaf in leaves):
        raise ValueError(
            f"a checkpointed {type(module).__name__} got a cache of keys and values, which running "
            "it again in backward would extend again: train with use_cache=False"
        )
    arguments = _Arguments(format, args, kwargs)
    surroundings = _Surroundings(tensors)
    members = _Members(module)

    def again() -> Callable[[], None]:
        given, named = arguments.restored()

        def second() -> None:
            with surroundings.restored(), members.restored(), _statistics_kept(module):
                forward(*given, **named)

        return second

    return Region(again).run(lambda: forward(*args, **kwargs))


class _Inputs(Function):
    """What a second run needs, kept where every Function keeps. Nobody goes backward through it."""

    @staticmethod
    def forward(anchor, pairs):
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, pairs = inputs
        keep(ctx, *pairs)


class _Decoded(Function):
    """A kept tensor, as the result of something: a leaf could not be changed in place."""

    @staticmethod
    def forward(anchor, packed, given):
        return given.back(packed.unpack()).detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def _anchor() -> Tensor:
    return torch.empty(0, requires_grad=True)


class _Given(NamedTuple):
    """How one tensor was given: whether it is a parameter, whether it needs a gradient, and how it
    lay in memory (None: row-major, or as nothing but its kind knows), which decides how layers keep
    it and has to be the same in the second run."""

    parameter: bool
    needs_grad: bool
    layout: _Layout | None

    @classmethod
    def of(cls, t: Tensor) -> _Given:
        layout = None
        if _is_plain(t) and not is_parameter(t) and not t.is_contiguous():
            layout = _Layout.of(t)
        return cls(is_parameter(t), t.requires_grad, layout)

    def laid(self, t: Tensor) -> Tensor:
        """What is to be packed."""
        return t if self.layout is None else self.layout.laid(t)

    def back(self, t: Tensor) -> Tensor:
        """The tensor, lying as it did, from what was packed, dense."""
        return t if self.layout is None else self.layout.back(t)

    def restore(self, packed: Packed) -> Tensor:
        """The tensor, as it was given, from what was packed."""
        if self.parameter:
            return packed.tensors[0]
        if self.needs_grad:
            return _Decoded.apply(_anchor(), packed, self)
        return self.back(packed.unpack())


class _Layout(NamedTuple):
    """How a tensor lies in memory; ``order``: its dimensions, slowest first."""

    size: torch.Size
    stride: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, t: Tensor) -> _Layout | None:
        """None where elements overlap otherwise than by expansion (``Tensor.unfold``): there is no
        second such tensor, and the second run has a row-major one."""
        order = memory_order(t)
        reach = 1
        for dim in reversed(order):
            n, stride = t.shape[dim], t.stride(dim)
            if n > 1 and 0 < stride < reach:
                return None
            reach += (n - 1) * stride
        return cls(t.shape, t.stride(), order)

    def laid(self, t: Tensor) -> Tensor:
        """t in that order, once where it is expanded."""
        for dim, stride in enumerate(self.stride):
            t = t if stride else t.narrow(dim, 0, 1)
        return t.permute(self.order)

    def back(self, t: Tensor) -> Tensor:
        """:meth:`laid` undone, gaps included."""
        t = unpermuted(t, self.order)
        if t.stride() != self.stride:
            once = torch.empty_strided(t.shape, self.stride, dtype=t.dtype, device=t.device)
            t = once.copy_(t)
        return t.expand(self.size)


def _is_plain(t: Tensor) -> bool:
    """Whether memtl's operators take it, which know no sparse tensors, and no subclasses but that
    which has a shape and no memory."""
    known = type(t) in (Tensor, FakeTensor)
    return known and t.layout == torch.strided and t.is_floating_point()


class _Arguments:
    """The arguments of a call: tensors where autograd keeps what backward needs, the rest here."""

    def __init__(self, format: Format, args: tuple[Any, ...], kwargs: dict[str, Any]):
        leaves, self._spec = tree_flatten((args, kwargs))
        self._rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._given = {i: _Given.of(t) for i, t in enumerate(leaves) if isinstance(t, Tensor)}
        first = min(self._given, default=None)
        pairs = []
        for i, given in self._given.items():
            coded = _is_plain(leaves[i]) and (given.needs_grad or i == first)
            by_reference = given.parameter or not coded
            pairs.append((given.laid(leaves[i]), Dense() if by_reference else format))
        self._kept = _Inputs.apply(_anchor(), tuple(pairs))  # without it the node would be freed

    def restored(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments again."""
        packed, _ = kept(self._kept.grad_fn)
        leaves = list(self._rest)
        for (i, given), p in zip(self._given.items(), packed, strict=True):
            leaves[i] = given.restore(p)
        return tree_unflatten(leaves, self._spec)


class _Surroundings:
    """What a forward sees besides its arguments: random numbers, autocast, the default device."""

    def __init__(self, tensors: list[Tensor]):
        devices = [t.device.type for t in tensors if t.device.type not in ("cpu", "meta")]
        self._device_type = devices[0] if devices else "cuda"  # as torch's checkpoint names it
        self._cpu_state = torch.get_rng_state()
        self._devices, self._device_states = get_device_states(*tensors)
        self._autocasts = [_autocast(kind) for kind in dict.fromkeys(("cpu", *devices))]
        self._default_device = torch.get_default_device()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The surroundings again, inside."""
        with contextlib.ExitStack() as stack:
            fork = torch.random.fork_rng(self._devices, device_type=self._device_type)
            stack.enter_context(fork)
            torch.set_rng_state(self._cpu_state)
            if self._devices:
                set_device_states(self._devices, self._device_states, device_type=self._device_type)
            for autocast in self._autocasts:
                stack.enter_context(autocast)
            if torch.get_default_device() != self._default_device:
                stack.enter_context(self._default_device)
            yield


class _Members:
    """A module's parameters and buffers: ``torch.func.functional_call`` puts others in their places
    for a forward, and backward comes later. FSDP, which exchanges shards and what it gathers from
    them, sees to its own."""

    def __init__(self, module: nn.Module):
        places: list[Any] = [p for m in module.modules() for p in (m._parameters, m._buffers)]
        self._members = [(p, name, t) for p in places for name, t in p.items()]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Each in its place, inside."""
        moved = []
        for place, name, t in self._members:
            other = place.get(name, t)
            if other is not t and not (_is_sharded(t) or _is_sharded(other)):
                moved.append((place, name, other))
                place[name] = t
        try:
            yield
        finally:
            for place, name, other in moved:
                place[name] = other


def _is_sharded(t: Any) -> bool:
    return hasattr(t, "full_tensor")  # a DTensor; its class takes long to import


def _autocast(device_type: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_enabled(device_type),
        torch.is_autocast_cache_enabled(),
    )


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, what batch norms count of what they see is put back in the end."""
    counted = [
        buffer
        for norm in module.modules()
        if norm.training and getattr(norm, "track_running_stats", False)
        for buffer in norm.buffers(recurse=False)
    ]
    before = [buffer.clone() for buffer in counted]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(counted, before, strict=True):
                buffer.copy_(value)
