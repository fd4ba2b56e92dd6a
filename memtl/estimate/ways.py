"""Ways to train a model, by name: what each changes in it first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from ..methods import (
    BackRazorConfig,
    BitFitConfig,
    CheckpointConfig,
    FrozenConfig,
    LinearProbeConfig,
    LowBitConfig,
    RepNetConfig,
    VQTConfig,
    apply,
)
from .step import Step

PROJECTIONS = (
    "qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin",
    "c_attn", "query_key_value",
)  # fmt: skip
"""What layers that make queries, keys and values are called."""

RANK = 8


def checkpoint(model: Any) -> None:
    """The library's own checkpointing of every block.

    Raises:
        ValueError: the model has none.
    """
    kind = type(model).__name__
    try:
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing()
            return
        # What transformers calls it since 5, and before.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"this {kind} has no checkpointing of its own: {error}") from None


def lora(model: Any) -> None:
    """Updates of rank 8 of every projection to queries, keys and values, and the classifier.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has no such projections.
    """
    try:
        import peft
    except ModuleNotFoundError:
        raise ImportError("peft is not installed: pip install memtl[models]") from None
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in PROJECTIONS if name in ends]
    if not targets:
        raise ValueError(
            f"this {type(model).__name__} has no projections to queries, keys and values "
            f"({', '.join(PROJECTIONS)})"
        )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=targets, fan_in_fan_out=targets == ["c_attn"]
    )
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    classifier = classifier_of(model)
    if classifier is not None:
        classifier.requires_grad_(True)


def classifier_of(model: Any) -> nn.Module | None:
    """The last layer of timm's and transformers' classifiers; None where there is none."""
    if hasattr(model, "get_classifier"):
        return model.get_classifier()
    return getattr(model, "classifier", None) or getattr(model, "score", None)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train: what is printed, and what it changes in the model of a step."""

    title: str
    change: Callable[[Any, Step], object]


def _frozen_lora(model: Any, step: Step) -> None:
    lora(model)
    apply(model, FrozenConfig())


def _blocks(model: Any, step: Step) -> None:
    apply(model, BackRazorConfig(keep=0.1))
    apply(model, CheckpointConfig())


WAYS: dict[str, Way] = {
    "stock": Way("stock", lambda model, step: None),
    "checkpointing": Way("checkpointing", lambda model, step: checkpoint(model)),
    "back-razor": Way(
        "Back Razor 0.1", lambda model, step: apply(model, BackRazorConfig(keep=0.1))
    ),
    "back-razor-small": Way(
        "Back Razor 0.1, small",
        lambda model, step: apply(model, BackRazorConfig.preset("small", keep=0.1)),
    ),
    "blocks": Way("Back Razor 0.1, blocks in 8 bits", _blocks),
    "low-bit": Way("4 bits, once", lambda model, step: apply(model, LowBitConfig(bits=4))),
    "lora": Way("LoRA", lambda model, step: lora(model)),
    "lora-frozen": Way("LoRA, frozen", _frozen_lora),
    "vqt": Way("VQT, 1 query", lambda model, step: apply(model, VQTConfig(**_classes(step)))),
    "rep-net": Way(
        "Rep-Net",
        lambda model, step: apply(
            model, RepNetConfig(**_classes(step), image_size=step.size or None)
        ),
    ),
    "bitfit": Way("biases", lambda model, step: apply(model, BitFitConfig(**_classes(step)))),
    "last-layer": Way(
        "last layer", lambda model, step: apply(model, LinearProbeConfig(**_classes(step)))
    ),
}
"""Name -> way, in the order of the table."""


def _classes(step: Step) -> dict[str, Any]:
    if not step.classes:
        raise ValueError("is for classifiers")
    return {"num_classes": step.classes}
