"""Data by name, as a network takes it: folders of images, torchvision's, Hugging Face's, and what
ships with memtl.

A source reads one sample at a time and nothing before; what is random about a sample follows from a
seed of its own, so that it is the same in whichever process, and whenever, it is drawn.
"""

from .opening import NAMES, open_data
from .samples import Data, Samples

__all__ = ["NAMES", "Data", "Samples", "open_data"]
