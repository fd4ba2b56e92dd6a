"""Checkpointing in few bits: blocks keep their input, and backward runs them again."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from ..nn import Report, checkpoint_blocks
from ..storage import Dense, Format, Quantized
from .base.config import Config, Patterns, check_bits, check_patterns
from .base.reading import check_not_read


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Config):
    """Of every block nothing is kept but its input, in few bits; the fewest bytes there are.

    Backward decodes a block's input and runs the block again. The forward stays exact, and so does
    what passes by a block on a residual connection. By itself it leaves the layers as they are; on
    top of a conversion (``BackRazorConfig``, say), which is applied first, what a block keeps while
    its backward runs is that conversion's: a smaller peak, and, with top-k on a CPU, a shorter
    step. Compiled code breaks at every block, which runs uncompiled; ``fullgraph=True`` is refused.

    Args:
        bits: 8, 4, 3 or 2; None for the input as it is, exact.
        target_modules: as in :func:`memtl.nn.checkpoint_blocks`.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: bits that are none of those.
    """

    method: ClassVar[str] = "checkpoint"
    is_undone: ClassVar[bool] = True
    bits: int | None = 8
    target_modules: Patterns = None

    def __post_init__(self) -> None:
        check_bits(self, "bits")
        check_patterns(self, "target_modules")

    def format(self) -> Format:
        """How a block's input is kept."""
        return Dense() if self.bits is None else Quantized(self.bits)

    def apply(self, model: nn.Module) -> Report:
        """Checkpoint the blocks of ``model``, in place.

        Raises:
            TypeError, ValueError: as :func:`memtl.nn.checkpoint_blocks`; or a method reads the
                model's blocks (VQT, Head2Toe), which a second run would show to it again.
        """
        check_not_read(model)
        return checkpoint_blocks(model, self.format(), target_modules=self.target_modules)
