"""Transfer methods, one file or folder each: a configuration that knows how to apply itself."""

from .adaptformer import AdaptFormerConfig
from .back_razor import BackRazorConfig
from .base.applied import apply, unconvert
from .base.config import Config
from .base.counting import print_trainable_parameters, trainable_parameters
from .base.record import applied
from .base.saving import load, save
from .base.transfer import Trained
from .bitfit import BitFitConfig
from .checkpoint import CheckpointConfig
from .frozen import FrozenConfig
from .head2toe import Head2ToeConfig
from .linear_probe import LinearProbeConfig
from .lite_residual import LiteResidualConfig
from .low_bit import LowBitConfig
from .norm_tuning import NormTuningConfig
from .rep_net import RepNetConfig
from .selection import Selection, select_features
from .tickets import Ticket, TicketConfig, draw_ticket
from .vpt import VPTConfig
from .vqt import VQTConfig

__all__ = [
    "AdaptFormerConfig",
    "BackRazorConfig",
    "BitFitConfig",
    "CheckpointConfig",
    "Config",
    "FrozenConfig",
    "Head2ToeConfig",
    "LinearProbeConfig",
    "LiteResidualConfig",
    "LowBitConfig",
    "NormTuningConfig",
    "RepNetConfig",
    "Selection",
    "Ticket",
    "TicketConfig",
    "Trained",
    "VPTConfig",
    "VQTConfig",
    "applied",
    "apply",
    "draw_ticket",
    "load",
    "print_trainable_parameters",
    "save",
    "select_features",
    "trainable_parameters",
    "unconvert",
]
