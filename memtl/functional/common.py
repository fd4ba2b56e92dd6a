"""What every function checks of its arguments, and what it asks of their surroundings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd.share import cast
from ..storage import Format, Quantized, TopK

LINEAR = TopK(keep=0.1)
FOUR_BITS = Quantized(bits=4)


def needs(*tensors: Tensor | None) -> list[bool]:
    """Which of these will be asked for a gradient."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def autocast(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """x as autocast hands it to a matrix product, and the dtype that weights are to be cast to."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, None
    dtype = torch.get_autocast_dtype(device)
    return cast(x, dtype), dtype


def autocast_float32(x: Tensor) -> Tensor:
    """x as CUDA's autocast hands it to the functions that it runs in float32."""
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if narrow and x.is_cuda and torch.is_autocast_enabled("cuda") else x


def check_tensors(name: str, **tensors: Tensor | None) -> None:
    for argument, t in tensors.items():
        if t is None and argument in ("bias", "weight"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(
                f"{name}: {argument} must be of a real floating-point dtype, got {t.dtype}"
            )
        if t.layout != torch.strided:
            raise TypeError(f"{name}: {argument} must be dense (strided), got {t.layout}")


def check_format(name: str, format: Format) -> None:
    if not isinstance(format, Format):
        raise TypeError(
            f"{name}: format must be a memtl.storage.Format, got {type(format).__name__}"
        )
    if isinstance(format, TopK) and format.keep is None:
        raise ValueError(f"{name}: format {format} leaves `keep` open: give a fraction in (0, 1]")


def check_shape(
    name: str, argument: str, t: Tensor | None, wanted: Sequence[int], x: Tensor
) -> None:
    if t is not None and tuple(t.shape) != tuple(wanted):
        raise ValueError(
            f"{name}: expected {argument} {list(wanted)} for x {sizes(x)}, got {sizes(t)}"
        )


def broadcastable(a: Sequence[int], b: Sequence[int]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def sizes(x: Tensor) -> list[int]:
    return list(x.shape)
