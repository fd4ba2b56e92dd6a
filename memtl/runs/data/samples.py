"""What there is to train on, a sample at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tasks.text import encode
from ..networks import Wants
from .transform import Transform


class Samples(Protocol):
    """Inputs with their labels. They can be pickled, for processes that load them."""

    def __len__(self) -> int: ...

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, Tensor]:
        """The input and its label, int64 of no dimension; inputs of all samples have one shape.
        Where samples are varied for training, ``seed`` alone says how; None: as in evaluation."""
        ...


@dataclasses.dataclass(frozen=True)
class Data:
    """A task.

    Attributes:
        train, val: samples to learn from, and to choose on.
        test: samples to report on, once, where there are any.
        classes: their names; a label is a position in it.
        metric: how it is scored, one of :data:`memtl.training.METRICS`.
        kind: "image" or "text".
    """

    train: Samples
    val: Samples
    test: Samples | None
    classes: tuple[str, ...]
    metric: str = "accuracy"
    kind: str = "image"


class Reader(Protocol):
    """Something with a length that reads one item at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of PIL that a reader gives; ``index`` says which of its items these are."""

    reader: Reader
    index: Sequence[int]
    labels: Sequence[int]
    transform: Transform

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, Tensor]:
        image = self.transform(self.reader[self.index[index]], seed)
        return image, torch.tensor(self.labels[index])


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts, or pairs of texts, that a reader gives, as ``[tokens]`` int64, padded at the end."""

    reader: Reader
    index: Sequence[int]
    labels: Sequence[int]
    tokenizer: Any
    tokens: int

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, Tensor]:
        text = self.reader[self.index[index]]
        ids = encode(self.tokenizer, [text], self.tokens)[0]
        padding = (0, self.tokens - len(ids))
        return F.pad(ids, padding, value=self.tokenizer.pad_token_id), torch.tensor(
            self.labels[index]
        )


@dataclasses.dataclass(frozen=True)
class Joined:
    """Samples one after the other."""

    parts: tuple[Samples, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, Tensor]:
        for part in self.parts:
            if index < len(part):
                return part.sample(index, seed)
            index -= len(part)
        raise IndexError(f"there is no sample {index} beyond the last")


@dataclasses.dataclass(frozen=True)
class Ink:
    """Small grey images ``[n, 1, h, w]`` in 0..1, resized to what a network takes; not varied."""

    ink: Tensor
    labels: Sequence[int]
    wants: Wants

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, Tensor]:
        wants = self.wants
        size = (wants.size, wants.size)
        ink = F.interpolate(self.ink[index, None], size=size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (wants.mean, wants.std))
        image = ink[0].clamp(0, 1).expand(wants.channels, -1, -1)  # which rounding may leave
        return (image - mean) / std, torch.tensor(self.labels[index])
