"""Models whose tensors have shapes and no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode


def mode() -> FakeTensorMode:
    """In which tensors have shapes and no data. Real constants, which a module may have from
    elsewhere, may be read."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def nothing_allocated(mode: FakeTensorMode) -> Iterator[None]:
    """While active, operators compute shapes alone.

    Raises:
        ValueError: something asks for a number in a tensor, or for a shape that depends on one.
    """
    try:
        with mode:
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"cannot be predicted without data: it goes by numbers in a tensor ({error.func})"
        ) from None


class Numbers(TorchDispatchMode):
    """While active, ``tensor.item()`` of a tensor without data gives 1: for what allocates the same
    whatever it says. Optimizers count their steps in a tensor, and what initialises weights looks
    whether any is to be drawn again."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and (
            args[0].is_meta or isinstance(args[0], FakeTensor)
        ):
            return 1.0
        return func(*args, **(kwargs or {}))


def build(
    make: Callable[[], nn.Module],
    change: Callable[[nn.Module], object],
    mode: FakeTensorMode,
    device: str,
) -> nn.Module:
    """The model that ``make`` gives, changed, its tensors fakes of that device. To be called
    outside of ``mode``.

    It is made on the device "meta", without memory; for real, and its tensors dropped, if its
    constructor reads numbers out of tensors. It is changed before its tensors are fakes, which
    ``Module.to`` cannot move.
    """
    try:
        with torch.device("meta"):
            model = make()
    except (NotImplementedError, RuntimeError):  # no numbers in tensors on that device
        model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"what builds the model must give a module, got {type(model).__name__}")
    with Numbers(), torch.device(next(model.parameters(), torch.empty(0)).device):
        change(model)
    done: dict[int, tuple[Tensor, Tensor]] = {}  # tied ones stay tied

    def faked(t: Tensor) -> Tensor:
        if id(t) not in done:
            done[id(t)] = t, _fake(t, mode, device)
        return done[id(t)][1]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: faked(t) for name, t in own.items() if t is not None})  # type: ignore[misc]
        for name, value in vars(module).items():  # constants that are no buffers
            if isinstance(value, Tensor) and value.is_meta:
                vars(module)[name] = faked(value)
    return model


def _fake(t: Tensor, mode: FakeTensorMode, device: str) -> Tensor:
    if isinstance(t, FakeTensor):
        return t
    data = t.detach()
    if not t.is_meta:
        data = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    with torch.no_grad():
        fake: Tensor = FakeTensor(mode, data, torch.device(device))
    if isinstance(t, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=t.requires_grad)
    return fake
