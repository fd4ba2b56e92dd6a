"""Linear layers with a masked weight that multiply with what survives alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from ..functional.sparse import sparse_pays
from ..storage import Dense
from .layers import forward_owner
from .masked import MaskedWeight
from .swap import original_class

MANY = 2**20
"""Rows of an input for which a layer is worth it, if it is for any."""


class SparseLinear(MaskedWeight):
    """In front of a linear layer's own class: its products run over the surviving weights, where
    that is faster than over all of them. Equal up to the order of sums.

    A conversion in front of this asks for ``memtl_sparse_mask`` too.
    """

    memtl_density: float | None
    """The share of the weight that survives; None: products are always sparse."""

    memtl_passes = True  # layers are found by the forward behind this one

    if TYPE_CHECKING:
        weight: Any
        bias: Any

    def memtl_sparse_mask(self, input: Tensor) -> Tensor | None:
        """The bits of the weight, unless dense products with ``input`` are faster."""
        bits, weight = self._buffers["weight_bits"], self._parameters["weight"]
        if weight is None:  # in 8 bits: its own class multiplies
            return None
        if self.memtl_density is None:
            return bits
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        rows = input.shape[:-1].numel()
        return bits if sparse_pays(self.memtl_density, rows, dtype, kind) else None

    def forward(self, input: Tensor) -> Tensor:
        mask = self.memtl_sparse_mask(input)
        if mask is None:
            return super().forward(input)  # type: ignore[misc]
        return functional.linear(input, self.weight, self.bias, format=Dense(), mask=mask)


def can_be_sparse(module: nn.Module, density: float | None = None) -> bool:
    """Whether :class:`SparseLinear` serves this module; with ``density``, whether it is ever faster
    at that."""
    cls = original_class(module)
    if not issubclass(cls, nn.Linear) or forward_owner(cls) is not nn.Linear:
        return False
    if issubclass(cls, nn.modules.linear.NonDynamicallyQuantizableLinear):  # attention multiplies
        return False
    return density is None or sparse_pays(density, MANY)
