"""How networks are trained and tickets drawn; what a run is."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import memtl

from ..methods.tickets import TicketConfig
from ..tasks import Split
from ..training import Adversarial, Attack, Settings, loss_of
from ..training.loop import Objective
from . import domain as domains
from .domain import Domain
from .plan import ADVERSARIAL, DRAWINGS, ROUND, SOURCE, STANDARD, Cell, Draw, sparsity

EPS, EPS_PICTURES = 0.1, 8 / 255
"""Of attacks on digits, and on photographs, where much less is seen."""

CLIP_NORM = 1.0
DRAWING_SEED = 1000
"""Of the order of the data in every round, and of the head; none of the runs has it."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training.

    Args:
        steps, learning_rate: of a transfer.
        round_steps, round_rate: of a round of a ticket.
        learned_rate: of a learned one, whose scores are trained twice as long, by SGD.
        batch_size: of both.
        eps: radius of the ball of every attack, in the maximum norm, of pixels in 0..1.
        train_steps, test_steps: of the attacks that are trained with, and measured by.
        autoattack: measure by AutoAttack too.
    """

    steps: int | None = None
    learning_rate: float | None = None
    round_steps: int = 60
    round_rate: float = 1e-3
    learned_rate: float = 0.1
    batch_size: int = 64
    eps: float = EPS
    train_steps: int = 3
    test_steps: int = 20
    autoattack: bool = False

    def __post_init__(self) -> None:
        self.trained_with, self.measured_by  # noqa: B018, before any run is

    @property
    def trained_with(self) -> Attack:
        """Two thirds of the radius a step, of three, as Chen et al. have it."""
        return Attack(self.eps, self.train_steps, 2 * self.eps / self.train_steps)

    @property
    def measured_by(self) -> Attack:
        """A quarter of the radius a step, as Chen et al. have it."""
        return Attack(self.eps, self.test_steps, self.eps / 4)

    def objective(self, regime: str) -> Objective:
        """What is minimised."""
        return Adversarial(self.trained_with) if regime == ADVERSARIAL else loss_of


STEPS = ((100, 120), (10, 80), (0, 60))
"""Of a transfer: from so many per cent of the data, so many steps."""

CANDIDATES = (1e-3, 2e-3, 4e-3)
RATES = {STANDARD: 2e-3, ADVERSARIAL: 2e-3}
"""Learning rates of a transfer, alike for every network and ticket.

Standard transfer's is from ``--tune --seeds 1 --pretrainings standard pgd``: on the validation
split, in %, the mean of both networks in the order of the candidates: with all of the data 99.7
99.8 99.7, with 10 % 94.2 94.8 94.8, with 1 % 73.0 74.5 74.0. Adversarial transfer's was not tuned.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """What tells a run from others; it decides the result, on one machine and with as many threads.

    ``network`` and ``data`` are fingerprints, ``drawn`` says how the ticket was drawn
    (:meth:`Setup.drawn`). Versions of torch, the device, and code that was changed without a new
    version are not covered: after such a change, choose another folder.
    """

    network: str
    data: str
    subset: str
    pretraining: str
    drawing: str
    level: int
    regime: str
    percent: float
    seed: int
    drawn: str
    steps: int
    batch_size: int
    learning_rate: float
    trained_with: str
    measured_by: str
    split: str
    memtl: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run; of one that diverged the error, and None else.

    Attributes:
        accuracy, robust: of the images, and under attack.
        nll, ece: negative log-likelihood and expected calibration error.
        auc_noise, auc_letters: how well confidence tells the target's images from others; None
            where there are no such others.
        seconds: that it took.
        autoattack: accuracy under AutoAttack, where that was asked for.
    """

    key: Key
    accuracy: float | None
    robust: float | None
    nll: float | None
    ece: float | None
    auc_noise: float | None
    auc_letters: float | None
    error: str | None
    seconds: float
    autoattack: float | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs of a command have in common.

    Args:
        out: the folder of the results.
        domain: networks and data.
        recipe: how they are trained.
        device: where.
    """

    out: Path
    domain: Domain = dataclasses.field(default_factory=Domain)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    device: str = "cpu"

    def settings(
        self, regime: str, percent: float, seed: int, rate: float | None = None
    ) -> Settings:
        """Of a transfer. No weight decay: it would take weights to where tickets are drawn from."""
        recipe = self.recipe
        images = len(domains.part(self.domain, percent))
        steps = recipe.steps or next(steps for least, steps in STEPS if percent >= least)
        if rate is None:
            rate = RATES[regime] if recipe.learning_rate is None else recipe.learning_rate
        return Settings(
            steps, min(recipe.batch_size, images), rate,
            weight_decay=0.0, clip_norm=CLIP_NORM, seed=seed,
        )  # fmt: skip

    def round_settings(self, draw: Draw) -> Settings:
        """Of a round, or of the learning of a mask."""
        recipe = self.recipe
        learned = DRAWINGS[draw.drawing].scheme == "learned"
        data = self.drawing_data(draw)
        steps, rate, optimizer = recipe.round_steps, recipe.round_rate, "adamw"
        if learned:  # Adam moves scores so far from the weights that little is left of these
            steps, rate, optimizer = 2 * steps, recipe.learned_rate, "sgd"
        return Settings(
            steps, min(recipe.batch_size, len(data)), rate, optimizer=optimizer,
            weight_decay=0.0, clip_norm=CLIP_NORM, seed=DRAWING_SEED,
        )  # fmt: skip

    def drawing_data(self, draw: Draw) -> Split:
        """What tickets are drawn on."""
        if DRAWINGS[draw.drawing].data == SOURCE:
            return domains.source(self.domain)
        return domains.part(self.domain, draw.percent)

    def config(self, draw: Draw) -> TicketConfig:
        """How they are."""
        scheme = DRAWINGS[draw.drawing].scheme
        if scheme == "iterative":
            return TicketConfig(
                scheme=scheme, sparsity=sparsity(draw.level), amount=ROUND, of="remaining"
            )
        return TicketConfig(scheme=scheme, sparsity=sparsity(draw.level))

    def drawn(self, draw: Draw | None) -> str:
        """What tickets are due to, in words; rounds are the same however many follow."""
        if draw is None:
            return ""
        drawing, settings = DRAWINGS[draw.drawing], self.round_settings(draw)
        attack = f" under {self.recipe.trained_with}" if drawing.objective == ADVERSARIAL else ""
        where = "source" if drawing.data == SOURCE else f"{draw.percent:g} % of the target"
        what = (
            "rounds" if drawing.scheme == "iterative" else f"{drawing.scheme}, level {draw.level}"
        )
        return (
            f"{what} of {settings.steps} steps of {settings.batch_size} by {settings.optimizer} at "
            f"{settings.learning_rate:g}{attack} on {where}, seed {settings.seed}, by "
            f"{memtl.__version__}"
        )

    def folder(self, draw: Draw) -> Path:
        """Where tickets are kept: drawn otherwise they have another place."""
        network = domains.fingerprint_of_network(self.domain, draw.pretraining)
        data = domains.fingerprint_of_data(self.domain)
        said = f"{network} {data} {self.domain.subset} {self.drawn(draw)}"
        digest = hashlib.sha256(said.encode()).hexdigest()[:8]
        name = re.sub(r"\W+", "-", draw.pretraining)
        return self.out / "tickets" / f"{name}-{draw.drawing}-{digest}"

    def ticket(self, draw: Draw, level: int) -> Path:
        """The file of a level."""
        number = level if DRAWINGS[draw.drawing].scheme == "iterative" else 1
        return self.folder(draw) / f"round-{number:02}.safetensors"

    def key(
        self, cell: Cell, draw: Draw | None, *, split: str = "test", rate: float | None = None
    ) -> Key:
        """That of the run of a cell."""
        settings = self.settings(cell.regime, cell.percent, cell.seed, rate)
        return Key(
            domains.fingerprint_of_network(self.domain, cell.pretraining),
            domains.fingerprint_of_data(self.domain),
            self.domain.subset,
            **dataclasses.asdict(cell),
            drawn=self.drawn(draw),
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            trained_with=str(self.recipe.trained_with) if cell.regime == ADVERSARIAL else "",
            measured_by=f"{self.recipe.measured_by}{', AutoAttack' * self.recipe.autoattack}",
            split=split,
            memtl=memtl.__version__,
        )
