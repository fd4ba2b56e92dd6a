"""Lite residual modules beside every block of a frozen convolutional network.

Cai, Gan, Zhu and Han: TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning,
NeurIPS 2020.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from .base.side import SideConfig, Site
from .base.stages import Stages
from .base.transfer import check_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiteResidualConfig(SideConfig):
    """y = Block(x) + resize(Lite(pool(x))), at half the resolution, beside every block but those
    of the first stage; the modules, the biases and the classifier train.

    Batch norms stay batch norms (the authors replace those of their network by group norms, and
    pre-train it so, modules included).

    Args:
        num_classes, convert, weight_bits: as in :class:`memtl.methods.base.partial.PartialConfig`.
        expand, groups, weight_standardization, bias, image_size: as in
            :class:`memtl.methods.base.side.SideConfig`.
        kernel: of the spatial convolution; smaller where the pooled map is.
    """

    method: ClassVar[str] = "lite_residual"
    name: ClassVar[str] = "lite_residual"
    bias: bool = True
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("kernel", self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    def sites(self, model: nn.Module) -> list[Site]:
        """One beside every block."""
        found: list[Site] = []
        for block in (b for blocks in Stages.of(model, self.image_size).blocks for b in blocks):
            size = min(block.reads[1:])
            pooled = max(1, size // 2)
            largest = pooled if pooled % 2 else pooled - 1
            found.append(
                Site.at(
                    block,
                    pool=2,
                    kernel=min(self.kernel, largest),
                    stride=max(1, round(size / min(block.gives[1:]))),
                )
            )
        return found
