"""Tasks whose data is on the machine already: no download, no network."""

from memtl.tasks.digits import Task, load_digits
from memtl.tasks.glyphs import Glyphs
from memtl.tasks.outside import letters, noise
from memtl.tasks.pictures import load_pictures
from memtl.tasks.segmentation import load_digits_segmentation
from memtl.tasks.split import Images, Split
from memtl.tasks.subset import subset
from memtl.tasks.vtab import ImageFiles, VtabTask, load_digits_vtab, load_vtab

__all__ = [
    "Glyphs",
    "ImageFiles",
    "Images",
    "Split",
    "Task",
    "VtabTask",
    "letters",
    "load_digits",
    "load_digits_segmentation",
    "load_digits_vtab",
    "load_pictures",
    "load_vtab",
    "noise",
    "subset",
]
