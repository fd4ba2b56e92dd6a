"""The largest deviations from the column means."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .topk import WithTopK


@dataclasses.dataclass(frozen=True)
class CenteredTopK(WithTopK):
    """Keep the mean of every column, and a fraction of the deviations from it, the largest ones;
    the rest reads back as the mean.

    For x [..., D] the mean is over all rows, a number a column; of a vector it is one number. The
    weight gradient is :class:`TopK`'s and the mean's outer product with the sum of grad_out: the
    dense activation is never made. A convolution that does not cut its input into patches hands
    over a sample a row: there the mean is over the batch, element by element, and x is rebuilt.

    Args:
        keep: fraction kept, in (0, 1]; None leaves it to the configuration that uses the format.
        values: as for :class:`TopK`, whose blocks of 256 these are.

    A column whose mean is not finite is not centred, so NaN and infinities are kept as such.

    Memory: that of ``TopK``, and 4 bytes a column (32 / T bits an element for T rows).
    """

    kind: ClassVar[str] = "centered"

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.contiguous()  # the order of the sum is then its shape's alone
        if x.dim() > 1:
            mean = x.mean(tuple(range(x.dim() - 1)), dtype=torch.float32)
        else:
            mean = x.mean(dtype=torch.float32).view(1)
        mean = mean.nan_to_num(0.0, 0.0, 0.0)
        return *self.topk.pack((x - mean).view(x.shape)), mean

    def unpack(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        *kept, mean = packed
        deviation = self.topk.unpack(tuple(kept), shape, torch.float32)
        return (deviation + mean).view(shape).to(dtype)

    def weight_grad(
        self, packed: tuple[Tensor, ...], shape: torch.Size, grad_out: Tensor
    ) -> Tensor:
        *kept, mean = packed
        grad = self.topk.weight_grad(tuple(kept), shape, grad_out)
        return grad.addr_(grad_out.sum(0, dtype=torch.float32), mean.expand(shape[-1]))

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return self.topk.nbytes(shape, dtype) + 4 * (shape[-1] if len(shape) > 1 else 1)

    def __str__(self) -> str:
        return f"centered {self.topk}{self._once}"
