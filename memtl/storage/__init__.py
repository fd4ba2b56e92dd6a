"""How a tensor is kept between forward and backward; one file a format."""

from .bits import Bits
from .dense import Dense
from .format import Format, Packed, format_from_dict, pack
from .quantized import Quantized
from .topk import TopK

__all__ = ["Bits", "Dense", "Format", "Packed", "Quantized", "TopK", "format_from_dict", "pack"]
