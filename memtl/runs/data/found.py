"""What a source found, before it is split and given to a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from .samples import Reader


class Part(NamedTuple):
    """Images or texts that ``reader`` gives, and the label of each."""

    reader: Reader
    labels: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Found:
    """``parts`` are "train", and "val" and "test" where they are; ``kind`` is "image" or "text".

    Raises:
        ValueError: there are fewer than two classes, or nothing in a part; the message begins with
            ``origin``.
    """

    origin: str
    parts: dict[str, Part]
    classes: tuple[str, ...]
    kind: str = "image"

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            named = ", ".join(self.classes) or "none"
            raise ValueError(f"{self.origin} must have at least two classes, has {named}")
        for name, part in self.parts.items():
            if not len(part.labels):
                raise ValueError(f"{self.origin} has nothing for {name}")
