"""Saying what was measured: tables, plots, one HTML page, and the machine it was measured on."""

from .environment import check_device, environment, origin
from .html import Page
from .plots import Point, curves, tradeoff
from .table import Table, mean_std, ratio

__all__ = [
    "Page",
    "Point",
    "Table",
    "check_device",
    "curves",
    "environment",
    "mean_std",
    "origin",
    "ratio",
    "tradeoff",
]
