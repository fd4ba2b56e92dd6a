"""How close the gradients computed from what is kept are to the exact ones, and at how many bytes.

``measure(model, step)`` tries every configuration, every format in every role, and says how the
error travels through the depth of the network; ``memtl bench fidelity`` does it from the shell::

    from memtl import fidelity

    print(fidelity.measure(model, lambda m: F.cross_entropy(m(x), y), batch_size=len(x)))
"""

from .compare import Agreement
from .measure import configurations, measure
from .names import parse
from .recommend import Choice, choose
from .result import Result
from .rows import Row, Thresholds

__all__ = [
    "Agreement",
    "Choice",
    "Result",
    "Row",
    "Thresholds",
    "choose",
    "configurations",
    "measure",
    "parse",
]
