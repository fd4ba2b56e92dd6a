"""The order of the data: a function of the seed and the step, with no state of its own.

All samples are one endless row of positions, an epoch's permutation after the other. A step takes
the next positions of it, so that any step of a run can be the first that a process does, and
processes share a step's positions between them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    from .data import Samples


def mixed(seed: int, *parts: int | str) -> int:
    """A number of 63 bits that ``seed`` and the parts decide; another part gives an unrelated
    one."""
    text = "/".join(map(str, (seed, *parts))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@dataclasses.dataclass(frozen=True)
class Order:
    """Which samples a process sees when.

    Args:
        samples: there are.
        batch_size: of a forward, in each process.
        accumulate: forwards of a step.
        rank, world: this process, of how many.
        seed: of the permutations.
    """

    samples: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    seed: int = 0

    @property
    def a_step(self) -> int:
        """Samples of a step, in all processes."""
        return self.batch_size * self.accumulate * self.world

    def positions(self, step: int) -> Iterator[range]:
        """Those of every forward of a step, counted from 0. All processes together take one range,
        whatever their number."""
        for part in range(self.accumulate):
            start = step * self.a_step + (part * self.world + self.rank) * self.batch_size
            yield range(start, start + self.batch_size)

    def permutation(self, epoch: int) -> Tensor:
        """The order of an epoch."""
        generator = torch.Generator().manual_seed(mixed(self.seed, "order", epoch))
        return torch.randperm(self.samples, generator=generator)


class Batches(Sampler):
    """For every forward from step ``first`` on to ``last``: an index and a seed a sample. The seed,
    of its augmentation, is that of its position: no sample is seen twice alike."""

    def __init__(self, order: Order, first: int, last: int):
        self.order, self.first, self.last = order, first, last

    def __len__(self) -> int:
        return (self.last - self.first) * self.order.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, known = self.order, -1
        permutation = torch.empty(0)
        for step in range(self.first, self.last):
            for positions in order.positions(step):
                batch = []
                for position in positions:
                    epoch, place = divmod(position, order.samples)
                    if epoch != known:
                        known, permutation = epoch, order.permutation(epoch)
                    seed = mixed(order.seed, "sample", position)
                    batch.append((int(permutation[place]), seed))
                yield batch


class _Read(Dataset):
    """Samples by index and seed."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[Tensor, Tensor]:
        return self.samples.sample(*item)


def loader(samples: Samples, batches: Any, workers: int, device: torch.device) -> DataLoader:
    """What loads those batches, lists of an index and a seed (None: to evaluate), in ``workers``
    processes."""
    return DataLoader(
        _Read(samples),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_interrupts,
        # Its own, and never drawn from: what a step draws is of its number alone.
        generator=torch.Generator().manual_seed(0),
    )


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C goes to every process of a terminal: when to end is for the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
