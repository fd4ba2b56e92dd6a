"""How a tensor is kept between forward and backward; one file a format."""

from .bits import Bits
from .centered import CenteredTopK
from .dense import Dense
from .format import Format, Packed, format_from_dict, pack
from .quantized import Quantized
from .sign import SignMean
from .topk import TopK

__all__ = [
    "Bits",
    "CenteredTopK",
    "Dense",
    "Format",
    "Packed",
    "Quantized",
    "SignMean",
    "TopK",
    "format_from_dict",
    "pack",
]
