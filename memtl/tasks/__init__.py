"""Tasks whose data is on the machine already: no download, no network."""

from memtl.tasks.digits import Split, Task, load_digits
from memtl.tasks.glyphs import Glyphs

__all__ = ["Glyphs", "Split", "Task", "load_digits"]
