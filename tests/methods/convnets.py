"""Small convolutional networks of timm's, with random weights and statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 5
SIZE = 64

NAMES = (
    "mobilenetv2_035",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "resnet18",
    "resnet26",
    "convnext_atto",
    "regnetx_002",
)


def build(name: str = "mobilenetv2_035", **options: Any) -> nn.Module:
    """The network of that name, in evaluation mode, with parameters and statistics that leave
    nothing at zero or one."""
    import timm

    model = timm.create_model(name, **{"num_classes": CLASSES, **options})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for p in model.parameters():
            if p.dim() <= 1:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def images(batch: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size)


def moved(modules: nn.Module) -> None:
    """Side modules that add something, with statistics of their own."""
    with torch.no_grad():
        for module in modules.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
