"""Saying what was measured: tables, plots, one HTML page, and the machine it was measured on."""

from .environment import environment
from .html import Page
from .plots import Point, curves, tradeoff
from .table import Table, mean_std, ratio

__all__ = [
    "Page",
    "Point",
    "Table",
    "curves",
    "environment",
    "mean_std",
    "ratio",
    "tradeoff",
]
