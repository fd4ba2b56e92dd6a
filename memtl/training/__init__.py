"""Fine-tuning a classifier: one small loop, what it costs, and the bar that shows how far it is;
objectives that make it robust, and how robust it is."""

from .attacks import Attack
from .cost import Cost, Way, costs
from .gap import domain_gap, frechet_distance
from .loop import (
    OPTIMIZERS,
    PRECISIONS,
    History,
    Settings,
    Step,
    evaluate,
    evaluating,
    fit,
    loss_of,
    score,
    seeded,
    tally,
)
from .masking import GradientCheck, check_gradients
from .metrics import METRICS
from .objectives import Adversarial, CatastrophicOverfitting, Noisy, Trades, Watched
from .progress import track
from .quality import Quality, quality
from .robust import autoattack, robust_accuracy

__all__ = [
    "METRICS",
    "OPTIMIZERS",
    "PRECISIONS",
    "Adversarial",
    "Attack",
    "CatastrophicOverfitting",
    "Cost",
    "GradientCheck",
    "History",
    "Noisy",
    "Quality",
    "Settings",
    "Step",
    "Trades",
    "Watched",
    "Way",
    "autoattack",
    "check_gradients",
    "costs",
    "domain_gap",
    "evaluate",
    "evaluating",
    "fit",
    "frechet_distance",
    "loss_of",
    "quality",
    "robust_accuracy",
    "score",
    "seeded",
    "tally",
    "track",
]
