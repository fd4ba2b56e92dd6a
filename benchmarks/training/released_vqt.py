"""Visual Query Tuning in the form of its released code: the baseline of ours.

In every block the queries stand in front of the tokens, pass through the norm, the projections and
the MLP with them, and are cut off behind it. So every token is a function of something that trains,
and autograd keeps all of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apply_released_vqt(model: Any) -> None:
    """One query a block of a timm ``VisionTransformer``, and a head on normalised features."""
    width, depth = model.embed_dim, len(model.blocks)
    classes = model.num_classes
    model.requires_grad_(False)
    model.prompts = nn.Parameter(torch.randn(depth, 1, width) * 0.1)
    model.head = nn.Linear(width * (1 + depth), classes)
    model.forward = _Forward(model)


class _Forward:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        model = self.model
        z = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        features = []
        for block, prompt in zip(model.blocks, model.prompts, strict=True):
            joined = torch.cat([prompt.expand(len(z), -1, -1), z], dim=1)
            joined = joined + _attention(block.attn, block.norm1(joined))
            joined = joined + block.mlp(block.norm2(joined))
            features.append(F.normalize(joined[:, :1].flatten(1), dim=1))
            z = joined[:, 1:]
        pooled = F.normalize(model.norm(z)[:, 0], dim=1)
        return model.head(torch.cat([pooled, *features], dim=1))


def _attention(attention: Any, x: Tensor) -> Tensor:
    """All rows ask, the first is not asked."""
    batch, n, width = x.shape
    q, k, v = attention.qkv(x).view(batch, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    found = F.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:])
    return attention.proj(found.transpose(1, 2).reshape(batch, n, width))
