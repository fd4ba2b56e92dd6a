"""Fine-tuning a classifier: one small loop, what it costs, and the bar that shows how far it is."""

from .cost import Cost, Way, costs
from .gap import domain_gap, frechet_distance
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
from .quality import Quality, quality

__all__ = [
    "METRICS",
    "OPTIMIZERS",
    "Cost",
    "History",
    "Quality",
    "Settings",
    "Step",
    "Way",
    "costs",
    "domain_gap",
    "evaluate",
    "evaluating",
    "fit",
    "frechet_distance",
    "loss_of",
    "quality",
    "score",
    "seeded",
    "track",
]
