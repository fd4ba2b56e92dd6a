"""Visual Query Tuning: a few learnable queries a layer read a frozen vision transformer.

Tu, Mai and Chao: Visual Query Tuning: Towards Effective Usage of Intermediate Representations for
Parameter and Memory Efficient Transfer Learning, CVPR 2023.
"""

from .cache import CachedBatch, FeatureCache, FromCache
from .tuning import VQTConfig, VQTHead

__all__ = ["CachedBatch", "FeatureCache", "FromCache", "VQTConfig", "VQTHead"]
