"""Fine-tuning a classifier: one small loop, what it costs, and the bar that shows how far it is;
objectives that make it robust, and how robust it is."""

from .attacks import Attack
from .cost import Cost, Way, costs
from .loop import (
    OPTIMIZERS,
    History,
    Settings,
    Step,
    evaluate,
    evaluating,
    fit,
    loss_of,
    score,
    seeded,
)
from .masking import GradientCheck, check_gradients
from .metrics import METRICS
from .objectives import Adversarial, CatastrophicOverfitting, Noisy, Trades, Watched
from .progress import track
from .robust import autoattack, robust_accuracy

__all__ = [
    "METRICS",
    "OPTIMIZERS",
    "Adversarial",
    "Attack",
    "CatastrophicOverfitting",
    "Cost",
    "GradientCheck",
    "History",
    "Noisy",
    "Settings",
    "Step",
    "Trades",
    "Watched",
    "Way",
    "autoattack",
    "check_gradients",
    "costs",
    "evaluate",
    "evaluating",
    "fit",
    "loss_of",
    "robust_accuracy",
    "score",
    "seeded",
    "track",
]
