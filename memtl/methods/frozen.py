"""Frozen layers keep what the gradient of their input needs, and nothing else.

PyTorch keeps the input of every convolution, batch norm in evaluation, ReLU and GELU whether or not
their parameters train, so that a frozen network costs almost what a trained one does.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..nn import ROLES
from ..storage import Dense, Format, Quantized
from .base.config import ConversionConfig, check_bits


@dataclasses.dataclass(frozen=True)
class FrozenConfig(ConversionConfig):
    """No gradient changes, not by a bit; nothing is kept that no gradient needs.

    Kept for backward: nothing by frozen linear layers, convolutions and batch norms in evaluation;
    one bit an element by ReLU, its kin and dropout; the place of a maximum by pooling; its input by
    a normalisation (and two numbers a row) or an activation with a curved derivative (its output by
    sigmoid and tanh); q, k and v by attention, whose forward runs once more in backward; its input
    by a layer whose weight trains, unless it can be made, exactly, from what is kept already. All
    of that by reference: no tensor is copied but where torch copies one. Which weights train is
    looked up at every forward: thawing one later is safe.

    Exceptions. Sums that torch takes in another order may differ in the last bit: SyncBatchNorm; an
    RMSNorm behind a residual sum, to which stock adds its two gradients one by one; under autocast
    a weight used twice, whose gradients stock sums in bfloat16, memtl in float32; and what
    ``torch.compile`` makes of the rest. ReLU6 and Hardtanh let the gradient of NaN through.

    What is rebuilt in backward is rebuilt from tensors as they are then, parameters of norms among
    them: a write between forward and backward that autograd sees, as an optimizer's step on a
    norm's parameters, raises there; one it does not see (through ``.data`` or numpy, into a norm's
    bias say) changes gradients.

    Args:
        linear, convolution, attention, norm, activation: None for exact; else the bits, 8, 4, 3 or
            2, in which layers of that role keep what they keep (``activation``: of the derivative).
            Gradients are then approximate. For LoRA in the attention of a vision transformer, 8 in
            all of them: some 4.7 times fewer bytes than stock.
        target_modules, exclude_modules: as in :func:`memtl.nn.convert`.

    Raises:
        ValueError: bits that are none of those.
    """

    method: ClassVar[str] = "frozen"
    linear: int | None = None
    convolution: int | None = None
    attention: int | None = None
    norm: int | None = None
    activation: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self, *ROLES)

    def formats(self) -> dict[str, Format | None]:
        """Role -> format."""
        return {role: self._format(role) for role in ROLES}

    def _format(self, role: str) -> Format:
        bits = getattr(self, role)
        if bits is None:
            return Dense(rebuild=True)
        return Quantized(bits, rebuild=role != "activation")  # activations: the derivative
