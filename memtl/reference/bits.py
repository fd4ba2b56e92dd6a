"""One bit an element: the definition of the family ``bits`` in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BIT = 1 << torch.arange(8, dtype=torch.uint8)


def bits_pack(mask: Tensor) -> Tensor:
    """Bit ``i % 8`` of byte ``i // 8`` is element ``i``; the last byte is filled with zeros."""
    flat = mask.reshape(-1).to(torch.uint8)
    bytes_ = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (bytes_ * _BIT.to(mask.device)).sum(-1, dtype=torch.uint8)


def bits_pack_between(x: Tensor, lo: float | None, hi: float | None) -> Tensor:
    """The bits of the mask that is set unless x <= lo or x >= hi."""
    outside = torch.zeros_like(x, dtype=torch.bool)
    if lo is not None:
        outside |= x <= lo
    if hi is not None:
        outside |= x >= hi
    return bits_pack(~outside)


def bits_unpack(bits: Tensor, numel: int) -> Tensor:
    """The first ``numel`` bits as a flat bool tensor; works along the last dimension."""
    mask = (bits.unsqueeze(-1) & _BIT.to(bits.device)).ne(0)
    return mask.flatten(-2)[..., :numel]


def bits_apply(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    """x * scale where the bit is set; 0 elsewhere, also where x is NaN or infinite."""
    mask = bits_unpack(bits, x.numel()).view(x.shape)
    return torch.where(
        mask, x * scale, torch.zeros((), dtype=x.dtype, device=x.device)
    ).contiguous()


def bits_select(x: Tensor, bits: Tensor, count: int) -> Tensor:
    """The elements whose bit is set, in order."""
    mask = bits_unpack(bits, x.numel())
    _check_count("bits_select", mask, count)
    return x.reshape(-1)[mask]


def bits_expand(values: Tensor, bits: Tensor, size: list[int]) -> Tensor:
    """values, in order, where a bit is set, and 0 elsewhere."""
    dense = values.new_zeros(size)
    mask = bits_unpack(bits, dense.numel())
    _check_count("bits_expand", mask, values.numel())
    dense.view(-1)[mask] = values
    return dense


def _check_count(name: str, mask: Tensor, count: int) -> None:
    found = int(mask.sum())
    if found != count:
        raise ValueError(f"{name}: {count} values were asked for, and {found} bits are set")
