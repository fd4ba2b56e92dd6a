"""Saying what was measured: tables, plots, one HTML page, and the machine it was measured on."""

from .environment import check_device, environment, origin
from .html import Page
from .journal import Journal
from .plots import Point, curves, heatmap, lines, tradeoff
from .table import Table, mean_std, ratio

__all__ = [
    "Journal",
    "Page",
    "Point",
    "Table",
    "check_device",
    "curves",
    "environment",
    "heatmap",
    "lines",
    "mean_std",
    "origin",
    "ratio",
    "tradeoff",
]
