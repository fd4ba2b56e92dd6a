"""What a classifier reads, computed once: of a frozen backbone it never changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...training import evaluating
from .backbone import classifier, linear_of
from .head import ChunkedHead
from .record import unwrapped

if TYPE_CHECKING:
    from ...tasks import Images


@torch.no_grad()
def collect(model: nn.Module, images: Images, *, batch_size: int = 64) -> Tensor:
    """What the linear classifier of ``model``, in evaluation mode, reads of each image: [n, dim].

    Of a head on chunks they are the normalised chunks side by side, those selected only.
    """
    head = linear_of(classifier(unwrapped(model))[1])
    device = head.weight.device
    read: list[Tensor] = []

    def note(head: Any, args: tuple) -> None:
        (x,) = args
        read.append(head.normalized(x) if isinstance(head, ChunkedHead) else x.clone())

    with evaluating(model), head.register_forward_pre_hook(note):
        for batch in images.split(batch_size):
            model(batch.to(device))
    return torch.cat(read)


class OnFeatures(nn.Module):
    """A linear classifier alone, on what :func:`collect` gives: [n, dim] -> logits.

    Its parameters are those of ``head``: training it trains the model that has it.
    """

    def __init__(self, head: nn.Linear | ChunkedHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.head.weight, self.head.bias)
