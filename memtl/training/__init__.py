"""Fine-tuning a classifier: one small loop, and the bar that shows how far it is."""

from .loop import History, Settings, Step, evaluate, fit
from .progress import track

__all__ = ["History", "Settings", "Step", "evaluate", "fit", "track"]
