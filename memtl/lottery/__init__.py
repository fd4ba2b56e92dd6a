"""Lottery tickets of a pre-trained encoder: the experiment of Chen et al. (NeurIPS 2020).

``memtl tickets`` draws subnetworks on several tasks and by masked-language modelling, fine-tunes
the encoder under each of them, and says which do as well as the whole network, and where: on the
task they were drawn on, and on others. ``plan.py`` says what is run, ``work.py`` how.
"""

from .experiments import TASKS, Key, Recipe, Run, Setup
from .plan import Cell, Plan
from .results import Results
from .verdict import Verdict, sparsest

__all__ = [
    "TASKS",
    "Cell",
    "Key",
    "Plan",
    "Recipe",
    "Results",
    "Run",
    "Setup",
    "Verdict",
    "sparsest",
]
