"""AdaptFormer: a narrow network beside the MLP of every block of a frozen vision transformer.

Chen, Ge, Tong, Wang, Song, Wang and Luo: AdaptFormer: Adapting Vision Transformers for Scalable
Visual Recognition, NeurIPS 2022.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.swap import swap
from .base.backbone import Backbone
from .base.freezing import evaluate_all_but, freeze
from .base.reading import PerThread, tokens, with_tokens
from .base.transfer import Trained, TransferConfig, check_count, check_probability, replace

MLPS = ("mlp", "intermediate", "ffn")
"""Names of a block's MLP, or of the first half of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptFormerConfig(TransferConfig):
    """Adapters beside the MLPs of a frozen vision transformer, and a linear classifier.

    x = x' + MLP(norm(x')) + scale * Up(dropout(relu(Down(x')))), where x' is the sum of a block's
    input and its attention, as in the authors' code; the paper writes norm(x') in both. Up starts
    at zero: at first the model is what it was. Whatever else a block does to the MLP's branch
    (layer scale, stochastic depth) does not concern the adapter's. The model, but for the adapters'
    dropout, stays in evaluation mode whatever ``train()`` says. Gradients pass through all of it:
    ``memtl.apply`` a conversion first, or afterwards for the adapters' layers too, to keep less.

    Args:
        bottleneck: width of the adapter.
        scale: of what it adds.
        dropout: probability with which an entry of its middle is dropped in training.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: ``bottleneck`` < 1, or another value outside its range.
    """

    method: ClassVar[str] = "adaptformer"
    networks: ClassVar[str] = "vision transformers"
    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("bottleneck", self.bottleneck)
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise TypeError(f"scale must be a number, got {type(self.scale).__name__}")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")
        check_probability("dropout", self.dropout)

    def apply(self, model: nn.Module) -> Trained:
        """Give every block of ``model`` an adapter, as its submodule ``adapter``, and let the
        model's classifier train.

        Raises:
            TypeError, ValueError: as :meth:`Backbone.of`; or a block's MLP is not to be found; or a
                method was applied already.
        """
        backbone = Backbone.of(model)
        classes = self.classes(backbone.classes)
        blocks = [model.get_submodule(name) for name in backbone.blocks]
        branches = [_mlp_branch(block) for block in blocks]
        freeze(model)
        self.classify(model, backbone.head, backbone.features, classes)
        names = [f"{name}.adapter" for name in backbone.blocks]
        dtype = next(model.parameters()).dtype
        for name, block, branch in zip(names, blocks, branches, strict=True):
            adapter = Adapter(self, backbone.width).to(dtype)
            replace(model, name, adapter)
            for module in branch:
                module.register_forward_pre_hook(adapter.read)
            swap(block, AdaptedBlock)
        evaluate_all_but(model, *names, backbone.head)
        return Trained.of(model)


def _mlp_branch(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The MLP of a block, and its norm."""
    norms = [child for child in block.children() if "norm" in type(child).__name__.lower()]
    mlp = next((child for name, child in block.named_children() if name in MLPS), None)
    if mlp is None or len(norms) != 2:
        raise ValueError(
            f"cannot tell where the MLP of a {type(block).__name__} begins: expected two "
            f"norms, its attention's and its MLP's, and an MLP called {' or '.join(MLPS)}"
        )
    return mlp, norms[1]


@dataclasses.dataclass
class Adding:
    """What is going to be added to a block's output."""

    adding: Tensor | None = None


class Adapter(nn.Module):
    """x [B, N, D] -> scale * Up(dropout(relu(Down(x)))) [B, N, D]."""

    def __init__(self, config: AdaptFormerConfig, width: int) -> None:
        super().__init__()
        self.scale = config.scale
        self.dropout = config.dropout
        self.down = nn.Linear(width, config.bottleneck)
        self.up = nn.Linear(config.bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.state = PerThread(Adding)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.dropout(F.relu(self.down(x)), self.dropout, self.training)) * self.scale

    def read(self, module: nn.Module, args: tuple) -> None:
        """A pre-hook of the MLP and of its norm: x' is what the first of them reads, the norm in
        most networks, the MLP in those that normalise what it returns."""
        if self.state.now.adding is None:
            self.state.now.adding = self(args[0])

    def take(self) -> Tensor:
        """What to add to the output of the block that has run."""
        adding, self.state.now.adding = self.state.now.adding, None
        assert adding is not None
        return adding

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}"


class AdaptedBlock:
    """In front of the class of a block that has an adapter."""

    if TYPE_CHECKING:
        adapter: Adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.adapter.state.now.adding = None  # of a run that did not end
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return with_tokens(output, tokens(output) + self.adapter.take())
