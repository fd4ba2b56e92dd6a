"""Rep-Net: a tiny network beside a frozen one reprograms it, stage by stage.

Yang, Rakin and Fan: Rep-Net: Efficient On-Device Learning via Feature Reprogramming, CVPR 2022.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from .base.side import SideConfig, Site
from .base.stages import Stages

SMALL = 7  # size of a map up to which the kernel is the smaller one


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepNetConfig(SideConfig):
    """One small module a stage reads what comes into the stage and adds to what the stage's first
    block gives: x <- Block(x) + Module(x); the first module reads the image. The modules and the
    classifier train.

    A module works at the resolution of what it adds to where the block halves it, else at half of
    that. Its kernel is 5x5, on maps of 7x7 and less 3x3. (The authors' ResNet has one module more,
    beside the last block, and adds that of its first stage twice.) The frozen network runs in
    evaluation mode, its batch norms with their own statistics. Gradients pass through all of it
    behind the first module; of that nothing is kept but a bit for every ReLU.

    Args:
        num_classes, convert, weight_bits: as in :class:`memtl.methods.base.partial.PartialConfig`.
        expand, groups, weight_standardization, bias, image_size: as in
            :class:`memtl.methods.base.side.SideConfig`.
    """

    method: ClassVar[str] = "rep_net"
    name: ClassVar[str] = "rep_net"

    def sites(self, model: nn.Module) -> list[Site]:
        """One at the first block of every stage."""
        stages = Stages.of(model, self.image_size)
        found: list[Site] = []
        for block in (blocks[0] for blocks in stages.blocks):
            size = min(block.gives[1:])
            kernel = 3 if size <= SMALL else 5
            if found:
                ratio = max(1, round(min(block.reads[1:]) / size))
                found.append(Site.at(block, pool=max(2, ratio), kernel=kernel))
                continue
            pool = 2 * max(1, round(min(stages.image[1:]) / size))
            image, stem = stages.image, stages.stem
            found.append(Site(stem, block.name, image, block.gives, pool, kernel, early=True))
        return found
