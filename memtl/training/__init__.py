"""Fine-tuning a classifier: one small loop, what it costs, and the bar that shows how far it is."""

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
from .metrics import METRICS
from .progress import track

__all__ = [
    "METRICS",
    "OPTIMIZERS",
    "Cost",
    "History",
    "Settings",
    "Step",
    "Way",
    "costs",
    "evaluate",
    "evaluating",
    "fit",
    "loss_of",
    "score",
    "seeded",
    "track",
]
