"""Networks: by name, for the commands; for dense prediction."""

from .deeplab import Segmenter
from .named import NAMES, build, timm_model

__all__ = ["NAMES", "Segmenter", "build", "timm_model"]
