"""Networks: by name, for the commands."""

from .named import NAMES, build, timm_model

__all__ = ["NAMES", "build", "timm_model"]
