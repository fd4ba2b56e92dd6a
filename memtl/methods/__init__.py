"""Transfer methods, one file or folder each: a configuration that knows how to apply itself."""

from .applied import applied, apply, unconvert
from .back_razor import BackRazorConfig
from .config import Config
from .low_bit import LowBitConfig
from .saving import load, save
from .selection import Selection, select_features
from .transfer import Trained
from .vqt import VQTConfig

__all__ = [
    "BackRazorConfig",
    "Config",
    "LowBitConfig",
    "Selection",
    "Trained",
    "VQTConfig",
    "applied",
    "apply",
    "load",
    "save",
    "select_features",
    "unconvert",
]
