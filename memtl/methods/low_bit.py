"""Every state once, in a few bits; what it determines is rebuilt in backward.

What a network keeps is full of duplicates: a normalised input and the linear input that is its
affine image, an activation's input and its output, a batch norm's normalised input, the ReLU's
output and the next convolution's input. Each is kept once, group-wise in few bits with stochastic
rounding (as ActNN, Chen et al., ICML 2021, does for every copy), and the others are made from it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..nn import ROLES
from ..storage import Format, Quantized
from .base.config import ConversionConfig, check_bits


@dataclasses.dataclass(frozen=True)
class LowBitConfig(ConversionConfig):
    """Group-wise low-bit storage of every state, each kept once.

    At 4 bits gradients are close to the exact ones; ``memtl bench fidelity`` measures how close. On
    the shipped ViT every one has a cosine of at least 0.97. On the shipped MobileNetV2 weights do
    too, but not the scales of batch norms in front of a depthwise convolution and another batch
    norm, which hardly change what comes out: their gradients are small differences of large sums.
    ``norm=8`` brings those above 0.99. Forward and ``state_dict`` stay what they are.

    Args:
        bits: 8, 4, 3 or 2, of every role that has none of its own.
        linear, convolution, attention, norm, activation: bits of what layers of that role keep;
            None for ``bits``. A tensor is rebuilt only from states kept in at least as many bits as
            its own role asks for.
        target_modules, exclude_modules: as in :func:`memtl.nn.convert`.

    Raises:
        ValueError: bits that are none of those.
    """

    method: ClassVar[str] = "low_bit"
    bits: int = 4
    linear: int | None = None
    convolution: int | None = None
    attention: int | None = None
    norm: int | None = None
    activation: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None:
            raise TypeError("bits must be an int, got None")
        check_bits(self, "bits", *ROLES)

    def formats(self) -> dict[str, Format | None]:
        """Role -> format."""
        bits = {role: getattr(self, role) for role in ROLES}
        return {
            role: Quantized(self.bits if own is None else own, rebuild=True)
            for role, own in bits.items()
        }
