"""Visual Prompt Tuning: learnable tokens beside those of a frozen vision transformer.

Jia, Tang, Chen, Cardie, Belongie, Hariharan and Lim: Visual Prompt Tuning, ECCV 2022.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base.backbone import Backbone, uniform_like_patches
from .base.freezing import evaluate_all_but, freeze
from .base.reading import tokens, with_tokens
from .base.transfer import (
    Trained,
    TransferConfig,
    check_count,
    check_flag,
    check_probability,
    replace,
)

RELATIVE_POSITION = re.compile(r"rel(ative)?_pos")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VPTConfig(TransferConfig):
    """Prompts P_m [P, D] among the tokens that block m of a frozen vision transformer reads, and a
    linear classifier.

    [Z_m, _] = Block_m([Z_{m-1}, P_m]): prompts stand behind the class token (and what else comes
    before the patches) and are dropped behind the block, so the classifier sees the tokens it
    always saw. ``deep=False`` puts P_1 in front of the first block and drops it behind the last.
    The model, but for the prompts' dropout, stays in evaluation mode whatever ``train()`` says.
    Gradients pass through all of it, which keeps what training it keeps, less the inputs of linear
    layers: ``memtl.apply`` a conversion first to keep less.

    Args:
        num_prompts: P, of every block.
        deep: prompts of its own for every block.
        dropout: probability with which an entry of a prompt is dropped in training.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: P < 1, or another value outside its range.
    """

    method: ClassVar[str] = "vpt"
    networks: ClassVar[str] = "vision transformers"
    num_prompts: int = 10
    deep: bool = True
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_prompts", self.num_prompts)
        check_flag("deep", self.deep)
        check_probability("dropout", self.dropout)

    def apply(self, model: nn.Module) -> Trained:
        """Give ``model`` prompts, as its submodule ``vpt``, and let its classifier train.

        Raises:
            TypeError, ValueError: as :meth:`Backbone.of`; or positions in the model are relative
                and prompts have none; or a method was applied already.
        """
        backbone = Backbone.of(model)
        classes = self.classes(backbone.classes)
        relative = next(
            (n for n, _ in model.named_parameters() if RELATIVE_POSITION.search(n)), None
        )
        if relative is not None:
            raise ValueError(
                f"prompts have no place in this {type(model).__name__}: it has a bias for every "
                f"pair of its own tokens ({relative})"
            )
        prefix = getattr(model, "num_prefix_tokens", 1)  # any place does where none is rotary
        prompts = Prompts(self, backbone, prefix, next(model.parameters()))
        freeze(model)
        self.classify(model, backbone.head, backbone.features, classes)
        replace(model, "vpt", prompts)
        blocks = [model.get_submodule(name) for name in backbone.blocks]
        for block in blocks:
            module: Any
            for module in block.modules():
                # timm's rotary attention leaves so many tokens as they are.
                if isinstance(count := getattr(module, "num_prefix_tokens", None), int):
                    module.num_prefix_tokens = count + self.num_prompts
        # Hooks, since queries of VQT call a block's forward, and read prompts without having any.
        for m, span in enumerate([[block] for block in blocks] if self.deep else [blocks]):
            span[0].register_forward_pre_hook(functools.partial(prompts.insert, m))
            span[-1].register_forward_hook(prompts.drop)
        evaluate_all_but(model, "vpt", backbone.head)
        return Trained.of(model)


class Prompts(nn.Module):
    """The prompts, [blocks, P, D] or [1, P, D], and the hooks that put them in and take them out.

    Args:
        prefix: tokens in front of the prompts.
    """

    def __init__(self, config: VPTConfig, backbone: Backbone, prefix: int, like: Tensor) -> None:
        super().__init__()
        self.prefix = prefix
        self.dropout = config.dropout
        depth = len(backbone.blocks) if config.deep else 1
        shape = (depth, config.num_prompts, backbone.width)
        self.prompts = nn.Parameter(uniform_like_patches(backbone, shape, like.dtype))

    def insert(self, index: int, block: nn.Module, args: tuple) -> tuple:
        """[B, N, D] -> [B, N + P, D], before a block."""
        x, *rest = args
        prompts = self.prompts[index].to(x.dtype).expand(len(x), -1, -1)
        prompts = F.dropout(prompts, self.dropout, self.training)
        return (torch.cat((x[:, : self.prefix], prompts, x[:, self.prefix :]), dim=1), *rest)

    def drop(self, block: nn.Module, args: tuple, output: Any) -> Any:
        """[B, N + P, D] -> [B, N, D], after a block."""
        x = tokens(output)
        behind = self.prefix + self.prompts.shape[1]
        return with_tokens(output, torch.cat((x[:, : self.prefix], x[:, behind:]), dim=1))

    def extra_repr(self) -> str:
        depth, count, width = self.prompts.shape
        return f"{count} prompts of {width}, {depth} times, dropout={self.dropout}"
