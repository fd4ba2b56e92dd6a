"""A small network and small images, for the tests of attacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 5


def network(seed: int = 0) -> nn.Module:
    """With what differs between training and evaluation: a batch norm, and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(6 * 5 * 7, CLASSES),
        )
        nn.init.normal_(model[1].running_mean)
        nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


def images(n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images with values at both ends of [0, 1], and labels."""
    x = (1.4 * torch.rand(n, 2, 5, 7, dtype=torch.float64) - 0.2).clamp(0, 1).to(dtype)
    return x, torch.randint(CLASSES, (n,))
