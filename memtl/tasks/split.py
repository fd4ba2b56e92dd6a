"""Images with their labels: what every task is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Images(Protocol):
    """What training and evaluation ask of images; a tensor ``[n, ...]`` has it all. A batch is a
    tensor, or whatever else the model takes that has a length and ``to(device)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor, /) -> Any:
        """The images of a slice, or of an int64 tensor of positions, as one batch."""
        ...

    def split(self, batch_size: int, /) -> Iterable[Any]:
        """All of them in order, ``batch_size`` at a time, the last batch with what is left."""
        ...


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: ``[n, channels, height, width]`` float32, normalised as the task says; a tensor,
            or what makes its batches when they are asked for.
        labels: ``[n]`` int64, each in ``0 .. num_classes - 1``; ``[n, height, width]`` where every
            pixel has a class.
    """

    images: Images
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)
