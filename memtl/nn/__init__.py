"""Modules: what is known of each layer, and convert() / unconvert() for whole models."""

from .convert import Report, Row, convert, unconvert
from .layers import ROLES, Layer, layer

__all__ = ["ROLES", "Layer", "Report", "Row", "convert", "layer", "unconvert"]
