"""Networks: by name, for the commands."""

from .named import NAMES, build, timm_model
from .proxyless import proxylessnas_mobile

__all__ = ["NAMES", "build", "proxylessnas_mobile", "timm_model"]
