"""The k largest magnitudes of many tensors: the definition of the family ``threshold``."""

import torch
from torch import Tensor

from .bits import bits_pack, bits_unpack


def threshold_magnitude(xs: list[Tensor], masks: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest magnitude, and how many that equal it are among the k, tensor by tensor."""
    if not xs:  # on no device, so nobody else is asked
        raise ValueError("threshold_magnitude: expected one tensor or more, got none")
    magnitudes = [x.reshape(-1).abs() for x in xs]
    if masks:
        pairs = zip(magnitudes, masks, strict=True)
        magnitudes = [m[bits_unpack(mask, m.numel())] for m, mask in pairs]
    every = torch.cat(magnitudes)
    if not 0 <= k <= every.numel():
        raise ValueError(
            f"threshold_magnitude: expected k from 0 to {every.numel()}, as there are elements, "
            f"got {k}"
        )
    if k == 0:
        return every.new_full((), torch.inf), torch.zeros(
            len(xs), dtype=torch.int64, device=every.device
        )
    value = every.sort(descending=True).values[k - 1]  # NaN is sorted as the largest
    ties = k - _above(every, value).sum()
    equal = torch.stack([_equal(m, value).sum() for m in magnitudes])
    return value.clone(), (ties - (equal.cumsum(0) - equal)).clamp(min=0).minimum(equal)


def threshold_mask(x: Tensor, mask: Tensor | None, value: Tensor, ties: Tensor) -> Tensor:
    """What is above, and the first of what is equal."""
    magnitude, value = x.reshape(-1).abs(), value.reshape(())
    kept = torch.ones_like(magnitude, dtype=torch.bool)
    if mask is not None:
        kept = bits_unpack(mask, x.numel())
    equal = _equal(magnitude, value) & kept
    return bits_pack(_above(magnitude, value) & kept | equal & (equal.cumsum(0) <= ties))


def _above(magnitude: Tensor, value: Tensor) -> Tensor:
    return (magnitude > value) | (magnitude.isnan() & ~value.isnan())


def _equal(magnitude: Tensor, value: Tensor) -> Tensor:
    return (magnitude == value) | (magnitude.isnan() & value.isnan())
