"""Modules: what is known of each layer, and convert() / unconvert() for whole models."""

from .convert import convert, unconvert
from .layers import ROLES, Layer, layer
from .report import Report, Row

__all__ = ["ROLES", "Layer", "Report", "Row", "convert", "layer", "unconvert"]
