"""LoRA of peft: matrices of low rank beside frozen ones train, and the classifier.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen: LoRA: Low-Rank Adaptation of Large Language
Models, ICLR 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..methods.base.backbone import classifier
from ..methods.base.transfer import check_count, check_probability
from ..models.bert import Wrapped

ATTENTION = ("qkv", "query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "query_key_value",
             "c_attn", "in_proj", "Wqkv", "qkv_proj")  # fmt: skip
"""What networks call the projections of attention that peft adapts in those it knows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which matrices, and how.

    Args:
        rank: of what is added to each.
        alpha: what is added is scaled by alpha / rank; None: by 1.
        dropout: of what the low-rank matrices read, in [0, 1).
        targets: layers by their names, or the ends of these ("qkv", "mlp.fc1"); None: those that
            peft knows for the architecture, else the projections of attention.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a number is out of its range, or there are no targets.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_count("lora.rank", self.rank)
        check_probability("lora.dropout", self.dropout)
        if self.alpha is not None:
            if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
                raise TypeError(f"lora.alpha must be a number or none, got {self.alpha!r}")
            if not 0 < self.alpha < float("inf"):
                raise ValueError(f"lora.alpha must be positive and finite, got {self.alpha}")
        targets = self.targets
        if targets is None:
            return
        if isinstance(targets, str):
            targets = tuple(name.strip() for name in targets.split(","))
        if not isinstance(targets, Sequence) or not all(isinstance(t, str) for t in targets):
            raise TypeError(f"lora.targets must be names of layers or none, got {targets!r}")
        if not targets or not all(targets):
            raise ValueError("lora.targets must be names of layers, with a comma between them")
        object.__setattr__(self, "targets", tuple(targets))

    def apply(self, model: nn.Module) -> None:
        """Let nothing train but matrices of low rank, in place and from torch's generator, and
        what stands behind the backbone.

        Raises:
            ImportError: peft is not installed.
            ValueError: no layer has such a name, or there is no classifier.
        """
        try:
            import peft
        except ImportError:
            raise ImportError("lora needs peft: pip install memtl[models]") from None
        heads = _heads(model)
        there = [
            (name, module)
            for name, module in model.named_modules()
            if getattr(getattr(module, "weight", None), "ndim", 0) >= 2
            and not any(f"{name}.".startswith(f"{head}.") for head in heads)
        ]
        wanted = self.targets or _known(model)
        chosen = {name: m for name, m in there if any(_ends(name, t) for t in wanted)}
        missing = [t for t in self.targets or () if not any(_ends(name, t) for name in chosen)]
        if missing or not chosen:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name, _ in there))
            ends = [end for end in ends if not end.isdigit()] or [name for name, _ in there]
            what = f"layers {', '.join(missing)}" if missing else "projections of attention"
            raise ValueError(
                f"lora finds no {what} in this network: lora.targets=... may name "
                f"{', '.join(ends[:20])}"
            )
        transposed = {type(m).__name__ == "Conv1D" for m in chosen.values()}
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(chosen),
            fan_in_fan_out=transposed == {True},
        )
        peft.inject_adapter_in_model(config, model)
        for head in heads:
            model.get_submodule(head).requires_grad_(True)


def _heads(model: Any) -> list[str]:
    """What is new for a task: the classifier, and what else transformers puts behind a backbone."""
    names = [classifier(model)[0]]
    if isinstance(model, Wrapped):
        inner: Any = model.model
        backbone = inner.base_model_prefix
        names += [f"model.{name}" for name, _ in inner.named_children() if name != backbone]
    return names


def _known(model: Any) -> Sequence[str]:
    """Names of the layers to adapt where nobody says which."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(getattr(model, "model", None), "config", None), "model_type", None)
    found = KNOWN.get(kind or "")
    return found if isinstance(found, list) else ATTENTION


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
