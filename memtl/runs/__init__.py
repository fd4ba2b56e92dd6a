"""One training run: a network and data by name, settings in, a folder of results out."""

from .loop import Interrupted, train
from .predictions import predict
from .results import evaluate, load
from .settings import RunSettings

__all__ = ["Interrupted", "RunSettings", "evaluate", "load", "predict", "train"]
