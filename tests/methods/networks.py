"""Small networks for the tests of methods."""

from __future__ import annotations

import torch
from timm.models import VisionTransformer

from memtl.tasks import Split


def vit(depth: int = 3, **options) -> VisionTransformer:
    """Images [n, 3, 16, 16] -> 5 logits; 5 tokens of 16 features, 2 heads of 8."""
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
    return VisionTransformer(depth=depth, **{**shape, "num_classes": 5, **options})


def images(count: int = 12) -> Split:
    """Noise on one of 5 random patterns, which is the label."""
    labels = torch.arange(count) % 5
    return Split(torch.randn(count, 3, 16, 16) + 2 * torch.randn(5, 3, 16, 16)[labels], labels)
