"""What the launchers of ``quant`` ask of their arguments."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from memtl._ops import ACTIVATIONS, FLOATING, GROUP

BITS = (8, 4, 3, 2)
ALIGNMENT = 16


def check_bits(name: str, bits: int) -> None:
    torch._check_value(bits in BITS, lambda: f"{name}: expected bits 8, 4, 3 or 2, got {bits}")


def check_activation(name: str, activation: str) -> None:
    torch._check_value(
        activation in ACTIVATIONS,
        lambda: f"{name}: expected activation, one of {ACTIVATIONS}, got {activation!r}",
    )


def check_result(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected a result in float32, float64, bfloat16 or float16, got {dtype}"
        )


class Range(NamedTuple):
    """Of a fixed-range code, as kernels take it."""

    lo: float
    hi: float
    step: float


def checked_range(name: str, bits: int, lo: float, hi: float) -> Range:
    torch._check_value(lo < hi, lambda: f"{name}: expected lo < hi, got {lo} and {hi}")
    step, numbers = (hi - lo) / (2**bits - 2), torch.finfo(torch.float32)
    torch._check_value(
        max(abs(lo), abs(hi)) <= numbers.max and numbers.tiny <= step <= numbers.max,
        lambda: (
            f"{name}: expected lo and hi, and the steps between them, to be numbers of float32, "
            f"got {lo} and {hi}"
        ),
    )
    return Range(lo, hi, step)


def check_channels(name: str, channels: int, inner: int, numel: int) -> None:
    """Element i is of channel (i // inner) % channels."""
    torch._check_value(inner > 0, lambda: f"{name}: expected inner > 0, got {inner}")
    torch._check(
        channels > 0 and numel % (channels * inner) == 0,
        lambda: f"{name}: {channels} channels of {inner} do not divide {numel} elements",
    )


def check_numel(name: str, numel: int, **tensors: Tensor | None) -> None:
    for argument, t in tensors.items():
        if t is not None and t.numel() != numel:
            raise RuntimeError(
                f"{name}: expected {argument} of {numel} elements, got {tuple(t.shape)}"
            )


def folded(seed: int) -> int:
    """64 bits to 32, signed."""
    low = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return low - ((low & 0x80000000) << 1)


def new_codes(x: Tensor, bits: int) -> Tensor:
    return x.new_empty((triton.cdiv(x.numel(), GROUP), 8 * bits), dtype=torch.uint8)


def new_params(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], 2), dtype=torch.bfloat16)


def as_pairs(params: Tensor) -> Tensor:
    """Scale and offset as one integer."""
    return params.view(torch.int32)


def aligned(t: Tensor) -> Tensor:
    """Contiguous, from an address on that whole words can be read from."""
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()


def checked_codes(name: str, codes: Tensor, bits: int, numel: int) -> Tensor:
    wanted = (triton.cdiv(numel, GROUP), 8 * bits)
    torch._check_type(
        codes.dtype == torch.uint8, lambda: f"{name}: expected codes of uint8, got {codes.dtype}"
    )
    torch._check(
        tuple(codes.shape) == wanted,
        lambda: (
            f"{name}: {numel} elements in {bits} bits need codes {list(wanted)}, "
            f"got {list(codes.shape)}"
        ),
    )
    return aligned(codes)


def checked_params(name: str, params: Tensor, codes: Tensor) -> Tensor:
    """As integers."""
    wanted = (codes.shape[0], 2)
    torch._check(
        params.dtype == torch.bfloat16 and tuple(params.shape) == wanted,
        lambda: (
            f"{name}: expected params of bfloat16 {list(wanted)}, got {params.dtype} "
            f"{list(params.shape)}"
        ),
    )
    return as_pairs(aligned(params))
