"""What training needs, before any of it is allocated; and what papers say that it needs."""

from .predict import Prediction, predict
from .step import OPTIMIZERS, Step, optimizer

__all__ = ["OPTIMIZERS", "Prediction", "Step", "optimizer", "predict"]
