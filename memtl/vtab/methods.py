"""The methods that are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tasks import Split
from .backbone import Backbone
from .method import Grid, Method


def methods(backbone: Backbone) -> list[Method]:
    """All of them, on that network, in the order of the tables."""
    return [
        Method(
            "linear probe",
            lambda num_classes, seed: LinearProbe(backbone.build(num_classes, seed)),
            prepare_data=features,
        ),
        Method(
            "full fine-tuning",
            backbone.build,
            # a hundredth of the rates of what is new, where everything is trained already
            Grid(learning_rates=(1e-2, 5e-3, 2.5e-3, 1e-3, 5e-4)),
        ),
    ]


class LinearProbe(nn.Module):
    """The last layer of a network of timm's, which takes what the rest, frozen, makes of images."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.head = network.get_classifier().requires_grad_(True)

    def forward(self, features: Tensor) -> Tensor:
        """``[n, D]`` -> logits ``[n, num_classes]``."""
        return self.head(features)


@torch.no_grad()
def features(model: nn.Module, split: Split) -> Split:
    """What reaches the last layer of a :class:`LinearProbe`, ``[n, D]``, for every image."""
    network: Any = model.network
    network.eval()
    device = next(network.parameters()).device
    batches = [
        network.forward_head(network.forward_features(images.to(device)), pre_logits=True).cpu()
        for images in split.images.split(256)
    ]
    return Split(torch.cat(batches), split.labels)
