"""Transfer methods, one file or folder each: a configuration that knows how to apply itself."""

from .adaptformer import AdaptFormerConfig
from .applied import apply, unconvert
from .back_razor import BackRazorConfig
from .bitfit import BitFitConfig
from .config import Config
from .frozen import FrozenConfig
from .head2toe import Head2ToeConfig
from .linear_probe import LinearProbeConfig
from .lite_residual import LiteResidualConfig
from .low_bit import LowBitConfig
from .norm_tuning import NormTuningConfig
from .record import applied
from .rep_net import RepNetConfig
from .saving import load, save
from .selection import Selection, select_features
from .transfer import Trained
from .vpt import VPTConfig
from .vqt import VQTConfig

__all__ = [
    "AdaptFormerConfig",
    "BackRazorConfig",
    "BitFitConfig",
    "Config",
    "FrozenConfig",
    "Head2ToeConfig",
    "LinearProbeConfig",
    "LiteResidualConfig",
    "LowBitConfig",
    "NormTuningConfig",
    "RepNetConfig",
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
