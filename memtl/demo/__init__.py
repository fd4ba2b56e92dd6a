"""``memtl demo``: fine-tune a small shipped network several ways, and compare.

Every method starts from the same weights and sees the same batches in the same order. What it
keeps for backward, its peak and its time a step are measured on the same batch; accuracy is that
of the weights after the last step, on a test split that chose nothing.
"""

from .command import main

__all__ = ["main"]
