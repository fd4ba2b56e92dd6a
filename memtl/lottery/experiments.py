"""Tasks and how they are trained; what a run is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import memtl

from ..methods.tickets import TicketConfig
from ..methods.vqt.cache import fingerprint
from ..tasks import Task
from ..tasks.glue import load_glue
from ..tasks.squad import load_squad
from ..tasks.text import load_docstrings, load_docstrings_mlm
from ..training import Settings
from .encoder import Encoder
from .plan import MLM, Cell

CLIP_NORM = 1.0
ROUND = 0.1
"""What a round prunes, of the original weights."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a task is loaded and trained.

    Args:
        load: its name, a tokenizer and ``max_length`` -> the task, whose images are token
            identifiers.
        steps, batch_size, learning_rate: of a run, or of one round of a ticket.
        max_length: tokens of a text.
        candidates: learning rates that ``--tune`` tries.
        drawing_seed: of the head, the order of the data and dropout in every round of a ticket. It
            is none of the runs' seeds: a ticket is not tried with the head that it was drawn with.
    """

    load: Callable[[str, Any, int], Task]
    steps: int
    learning_rate: float
    max_length: int
    batch_size: int = 32
    candidates: tuple[float, ...] = (3e-4, 1e-3, 2e-3)
    drawing_seed: int = 1000

    def settings(self, seed: int) -> Settings:
        """No weight decay: it would take weights to where tickets are drawn from."""
        return Settings(
            self.steps, self.batch_size, self.learning_rate, weight_decay=0.0,
            clip_norm=CLIP_NORM, seed=seed,
        )  # fmt: skip


DOCSTRINGS: dict[str, Recipe] = {
    "package": Recipe(load_docstrings, steps=300, learning_rate=1e-3, max_length=32),
    "kind": Recipe(load_docstrings, steps=250, learning_rate=1e-3, max_length=32),
    "pair": Recipe(
        load_docstrings, steps=250, learning_rate=3e-4, max_length=48, candidates=(1e-4, 3e-4, 1e-3)
    ),
}
"""Tasks for the shipped encoder, which need no download.

Learning rates are from ``--tune --seeds 2``; on the validation split, in %, in the order of the
candidates: package 62.2 74.5 73.6, kind 73.3 75.1 73.1, pair 61.6 66.6 60.5.
"""

STEPS = {
    "cola": 804, "mnli": 36_816, "mrpc": 345, "qnli": 9_822, "qqp": 34_113, "rte": 234,
    "sst2": 6_315, "stsb": 540, "wnli": 60,
}  # fmt: skip
"""Of GLUE's tasks, those of the paper: three epochs of 32 of the whole training set, a tenth of
which is kept for choices here."""


def _glue(name: str, tokenizer: Any, max_length: int) -> Task:
    return load_glue(name.removeprefix("glue:"), tokenizer, max_length)


def _squad(name: str, tokenizer: Any, max_length: int) -> Task:
    return load_squad(tokenizer, max_length)


TASKS: dict[str, Recipe] = {
    **DOCSTRINGS,
    **{
        f"glue:{name}": Recipe(_glue, steps, 2e-5, 128, candidates=(1e-5, 2e-5, 5e-5))
        for name, steps in STEPS.items()
    },
    "squad": Recipe(_squad, 11_082, 3e-5, 384, batch_size=16, candidates=(2e-5, 3e-5, 5e-5)),
}
UNIVERSAL = Recipe(
    lambda name, tokenizer, max_length: load_docstrings_mlm(tokenizer, max_length),
    steps=200,
    learning_rate=5e-4,
    max_length=64,
    batch_size=64,
    drawing_seed=0,  # no run has this head
)
"""How the universal ticket is drawn."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What tells a run from others; it decides the result, on one machine and with as many threads.

    ``model`` and ``data`` are fingerprints, ``drawn`` says how the ticket's rounds were trained
    (:meth:`Setup.drawn`), ``memtl`` is the version. It covers neither the versions of torch and
    transformers, nor the device, nor code that was changed without a new version: after such a
    change, choose another folder.
    """

    model: str
    data: str
    task: str
    scheme: str
    source: str
    sparsity: int
    drawn: str
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    split: str
    memtl: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its score, or None and the error that ended it; its time."""

    key: Key
    score: float | None
    error: str | None
    seconds: float


@functools.cache
def encoder(name: str) -> Encoder:
    """The encoder of that name, loaded once in a process."""
    return Encoder(name)


@functools.cache
def load(task: str, model: str) -> Task:
    """A task, or what the universal ticket is drawn on, in the tokens of an encoder.

    Raises:
        ValueError: there is no such task.
    """
    recipe = recipe_of(task)
    return recipe.load(task, encoder(model).tokenizer, recipe.max_length)


@functools.cache
def fingerprint_of(task: str, model: str) -> str:
    """What tells the data of a task from others."""
    loaded = load(task, model)
    splits: Mapping[str, Any] = {name: getattr(loaded, name) for name in ("train", "val", "test")}
    parts = [(name, part) for name, s in splits.items() for part in (s.images, s.labels)]
    return fingerprint(parts)


def recipe_of(task: str) -> Recipe:
    """How a task is loaded and trained, if nothing else is asked for.

    Raises:
        ValueError: there is no such task.
    """
    known = TASKS | {MLM: UNIVERSAL}
    if task not in known:
        raise ValueError(f"tasks are {', '.join(TASKS)}, got {task!r}")
    return known[task]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs of a command have in common.

    Args:
        model: a folder or a name, as :class:`Encoder` takes it.
        out: the folder of the results.
        largest: sparsity of the last round of a ticket, in per cent.
        steps, batch_size: in place of every task's own.
        mlm_steps: of a round of the universal ticket.
        device: where to train.
    """

    model: str
    out: Path
    largest: int
    steps: int | None = None
    batch_size: int | None = None
    mlm_steps: int = UNIVERSAL.steps
    device: str = "cpu"

    def recipe(self, task: str) -> Recipe:
        """How a task is trained here."""
        found = recipe_of(task)
        if task == MLM:
            return dataclasses.replace(found, steps=self.mlm_steps)
        return dataclasses.replace(
            found,
            steps=self.steps or found.steps,
            batch_size=self.batch_size or found.batch_size,
        )

    def drawn(self, source: str) -> str:
        """What the tickets of ``source`` are due to, in words."""
        recipe = self.recipe(source)
        return (
            f"rounds of {recipe.steps} steps of {recipe.batch_size} at {recipe.learning_rate:g} "
            f"on {fingerprint_of(source, self.model)} with the seed {recipe.drawing_seed}, "
            f"to {self.largest} %, by {memtl.__version__}"
        )

    def rounds(self) -> TicketConfig:
        """How iterative tickets are drawn."""
        return TicketConfig(scheme="iterative", sparsity=self.largest / 100, amount=ROUND)

    def folder(self, source: str) -> Path:
        """Where the tickets of ``source`` are kept: drawn otherwise they have another place."""
        digest = hashlib.sha256(f"{encoder(self.model).fingerprint} {self.drawn(source)}".encode())
        name = re.sub(r"\W+", "-", source)
        return self.out / "tickets" / f"{name}-{digest.hexdigest()[:8]}"

    def ticket(self, source: str, sparsity: int) -> Path:
        """The file of the round that reached a sparsity, in per cent."""
        reached = [round(100 * share) for share in self.rounds().rounds()]
        return self.folder(source) / f"round-{reached.index(sparsity) + 1:02}.safetensors"

    def rounds_left(self, source: str) -> int:
        """How many rounds of a source are not drawn yet."""
        found = self.folder(source).glob("round-*.safetensors")
        return len(self.rounds().rounds()) - len([*found])

    def key(self, cell: Cell, *, split: str = "test", learning_rate: float | None = None) -> Key:
        """That of the run of a cell."""
        recipe = self.recipe(cell.task)
        return Key(
            encoder(self.model).fingerprint,
            fingerprint_of(cell.task, self.model),
            **dataclasses.asdict(cell),
            drawn=self.drawn(cell.source) if cell.source else "",
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            learning_rate=learning_rate or recipe.learning_rate,
            split=split,
            memtl=memtl.__version__,
        )
