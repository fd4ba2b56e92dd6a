"""Tasks whose data is on the machine already: no download, no network."""

from memtl.tasks.digits import Task, load_digits
from memtl.tasks.glyphs import Glyphs
from memtl.tasks.segmentation import load_digits_segmentation
from memtl.tasks.split import Images, Split
from memtl.tasks.vtab import ImageFiles, VtabTask, load_digits_vtab, load_vtab

__all__ = [
    "Glyphs",
    "ImageFiles",
    "Images",
    "Split",
    "Task",
    "VtabTask",
    "load_digits",
    "load_digits_segmentation",
    "load_digits_vtab",
    "load_vtab",
]
