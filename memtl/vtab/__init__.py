"""VTAB-1k by its published protocol: search on 800 / 200 images, then five runs on all 1000.

``memtl vtab`` compares ways to fine-tune one network: accuracy on every dataset, by group and over
all, beside what a step keeps and takes. A way is a :class:`Method`; ``methods.py`` lists them.
"""

from .backbone import Backbone
from .caches import Caches
from .method import Grid, Method
from .methods import methods
from .protocol import Outcome, Protocol
from .runs import Key, Run, Runs

__all__ = [
    "Backbone",
    "Caches",
    "Grid",
    "Key",
    "Method",
    "Outcome",
    "Protocol",
    "Run",
    "Runs",
    "methods",
]
