"""Modules: what is known of each layer, and convert() / unconvert() for whole models."""

from .checkpointed import checkpoint_blocks
from .convert import convert, unconvert
from .exactness import exact, stock
from .layers import ROLES, Layer, layer
from .report import Report, Row
from .standardized import StandardizedConv2d
from .weights import compress_weights, expand_weights

__all__ = [
    "ROLES",
    "Layer",
    "Report",
    "Row",
    "StandardizedConv2d",
    "checkpoint_blocks",
    "compress_weights",
    "convert",
    "exact",
    "expand_weights",
    "layer",
    "stock",
    "unconvert",
]
