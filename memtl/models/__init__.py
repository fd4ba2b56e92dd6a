"""Networks by name, for the commands, and those of papers that timm lacks."""

from .deeplab import Segmenter
from .named import NAMES, build, input_size, text_model, timm_model, transformers_config
from .normalized import Normalized
from .proxyless import proxylessnas_mobile
from .robust import load_robust

__all__ = [
    "NAMES",
    "Normalized",
    "Segmenter",
    "build",
    "input_size",
    "load_robust",
    "proxylessnas_mobile",
    "text_model",
    "timm_model",
    "transformers_config",
]
