"""What a method is to the protocol."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from torch import nn

from ..tasks import Split
from ..training import Settings


@dataclasses.dataclass(frozen=True)
class Grid:
    """The candidates of a search: every learning rate with every weight decay.

    Learning rates are for a batch of 256; they are scaled in proportion to the batch.

    Raises:
        ValueError: there is none of either, one comes twice, or one is out of range.
    """

    learning_rates: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)
    weight_decays: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 0.0)

    def __post_init__(self) -> None:
        for name, values, wanted in (
            ("learning rate", self.learning_rates, "positive"),
            ("weight decay", self.weight_decays, "at least 0"),
        ):
            if not values:
                raise ValueError(f"a grid needs a {name}")
            for value in values:
                if not math.isfinite(value) or value < 0 or (wanted == "positive" and not value):
                    raise ValueError(f"a {name} must be finite and {wanted}, got {value:g}")
                if values.count(value) > 1:
                    raise ValueError(f"the {name} {value:g} is in the grid twice")

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return itertools.product(self.learning_rates, self.weight_decays)

    def __str__(self) -> str:
        texts = (
            " ".join(f"{value:g}" for value in values)
            for values in (self.learning_rates, self.weight_decays)
        )
        return "learning rate {}, weight decay {}".format(*texts)

    def __len__(self) -> int:
        return len(self.learning_rates) * len(self.weight_decays)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune a network.

    Attributes:
        name: in tables and in ``runs.jsonl``, where it alone tells the method from others: it says
            whatever option changes the result.
        build: ``(num_classes, seed)`` -> the model, from the same pre-trained weights each time;
            ``seed`` decides whatever is new in it. What trains requires a gradient.
        grid: the learning rates and weight decays searched.
        prepare_data: ``(model, split)`` -> the split that ``model`` is trained and evaluated on
            instead, such as features of a frozen network, computed once. It is called once for each
            split and must depend on pre-trained weights alone, neither on what trains nor on the
            seed. ``model`` is on its device, and so may be what computes batches when asked.
        prepare_test: whether the test split, which is read once a training, is prepared too;
            without it ``model`` is given that split as it is.
        finish: ``(model, split, settings)`` -> the model that is evaluated, made of the one that
            ``settings`` trained on ``split`` (prepared), for instance by selecting features. It is
            called after every training, in the search too; random numbers are those of the seed.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    grid: Grid = Grid()
    prepare_data: Callable[[nn.Module, Split], Split] | None = None
    prepare_test: bool = True
    finish: Callable[[nn.Module, Split, Settings], nn.Module] | None = None
