"""Transfer methods, one file or folder each: a configuration that knows how to apply itself."""

from .adaptformer import AdaptFormerConfig
from .applied import apply, unconvert
from .back_razor import BackRazorConfig
from .config import Config
from .frozen import FrozenConfig
from .head2toe import Head2ToeConfig
from .linear_probe import LinearProbeConfig
from .low_bit import LowBitConfig
from .record import applied
from .saving import load, save
from .selection import Selection, select_features
from .transfer import Trained
from .vpt import VPTConfig
from .vqt import VQTConfig

__all__ = [
    "AdaptFormerConfig",
    "BackRazorConfig",
    "Config",
    "FrozenConfig",
    "Head2ToeConfig",
    "LinearProbeConfig",
    "LowBitConfig",
    "Selection",
    "Trained",
    "VPTConfig",
    "VQTConfig",
    "applied",
    "apply",
    "load",
    "save",
    "select_features",
    "unconvert",
]
