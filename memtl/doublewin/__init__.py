"""Tickets that transfer robustly: the experiments of Chen et al. (ICML 2022) and Fu et al.

``memtl doublewin`` draws tickets of networks that were pre-trained in several ways, robust ones
among them, transfers them by standard and by adversarial training, with much and with little data,
and says which tickets are as good as the whole network everywhere: a double win.

Chen, Zhang, Balachandra, Ma, Wang, Wang: Data-Efficient Double-Win Lottery Tickets from Robust
Pre-training, ICML 2022. Fu, Yuan, Wu, Yuan, Lin: Robust Tickets Can Transfer Better: Drawing More
Transferable Subnetworks in Transfer Learning, DAC 2023.
"""

from .experiments import Key, Recipe, Run, Setup
from .plan import DRAWINGS, Cell, Drawing, Plan
from .results import Results

__all__ = ["DRAWINGS", "Cell", "Drawing", "Key", "Plan", "Recipe", "Results", "Run", "Setup"]
