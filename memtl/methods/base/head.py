"""A linear classifier on the features of many layers, each normalised by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES_OF_PRIOR = 100
"""The bias starts where each of a hundred classes is as likely: log(1 / 99)."""


class ChunkedHead(nn.Module):
    """y = b + sum over chunks m of W_m x_m / |x_m|: ``nn.Linear`` on the concatenation of chunks
    that are L2-normalised one by one, without making it.

    Memory: the chunks themselves, a norm each, and one [B, classes] each. A head on ``selected``
    features keeps those and no others.

    Args:
        sizes: features of each chunk.
        num_classes: rows of the weight.
        normalize: divide each chunk by its norm.
        selected: how many features the head reads; None for all. Which ones is the buffer
            ``selected``, sorted indices into the concatenation.
    """

    selected: Tensor | None

    def __init__(
        self,
        sizes: Sequence[int],
        num_classes: int,
        normalize: bool = True,
        selected: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.sizes = tuple(sizes)
        self.normalize = normalize
        features = sum(sizes)
        if selected is not None and not 1 <= selected <= features:
            raise ValueError(f"selected must be in 1 .. {features}, got {selected}")
        self.weight = nn.Parameter(torch.empty(num_classes, selected or features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, dtype=dtype))
        index = None if selected is None else torch.arange(selected)
        self.register_buffer("selected", index)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation by fan-out, and the bias of rare classes."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        nn.init.constant_(self.bias, -math.log(CLASSES_OF_PRIOR - 1))

    def forward(self, chunks: Sequence[Tensor]) -> Tensor:
        """Chunks [B, size] -> logits [B, classes].

        Raises:
            ValueError: not as many chunks, or not of the sizes that the head was built for.
        """
        found = tuple(chunk.shape[-1] for chunk in chunks)
        if found != self.sizes:
            raise ValueError(f"expected chunks of {self.sizes} features, got {found}")
        indices = self.indices()
        sizes = self.sizes if indices is None else [len(i) for i in indices]
        logits: Tensor = self.bias
        for m, (chunk, weight) in enumerate(
            zip(chunks, self.weight.split(list(sizes), dim=1), strict=True)
        ):
            part = chunk if indices is None else chunk[:, indices[m]]
            y = F.linear(part, weight)
            if self.normalize:
                y = y / torch.linalg.vector_norm(chunk, dim=-1, keepdim=True).clamp_min(1e-12)
            logits = logits + y
        return logits

    def indices(self) -> list[Tensor] | None:
        """Of each chunk, the selected features; None where all are read."""
        if self.selected is None:
            return None
        ends = torch.tensor(list(accumulate(self.sizes)), device=self.selected.device)
        cuts = torch.searchsorted(self.selected, ends).tolist()
        starts = [0, *ends.tolist()[:-1]]
        return [
            self.selected[a:b] - start
            for a, b, start in zip([0, *cuts[:-1]], cuts, starts, strict=True)
        ]

    def normalized(self, chunks: Sequence[Tensor]) -> Tensor:
        """What the weight is multiplied with, [B, features]: for selection and for caches."""
        if self.normalize:
            chunks = [F.normalize(chunk, dim=-1) for chunk in chunks]
        x = torch.cat(list(chunks), dim=-1)
        return x if self.selected is None else x[:, self.selected]

    def extra_repr(self) -> str:
        classes, read = self.weight.shape
        return (
            f"{read} of {sum(self.sizes)} features in {len(self.sizes)} chunks, {classes} classes"
        )
