"""The methods that are compared."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..methods import (
    AdaptFormerConfig,
    Head2ToeConfig,
    LinearProbeConfig,
    LowBitConfig,
    VPTConfig,
    VQTConfig,
    apply,
    select_features,
)
from ..methods.base.backbone import attention_blocks, classifier, linear_of
from ..methods.base.features import OnFeatures, collect
from ..methods.vqt import CachedBatch, FromCache
from ..tasks import Split
from ..training import Settings, seeded
from .backbone import Backbone
from .caches import Caches
from .method import Grid, Method

# Where what trains is new and sits in the backbone, and where everything was trained already.
INSIDE = Grid(learning_rates=(5e-2, 2e-2, 1e-2, 5e-3, 2e-3))
EVERYTHING = Grid(learning_rates=(1e-2, 5e-3, 2.5e-3, 1e-3, 5e-4))
LORA_RANK = 8
SELECTED = 0.5


def methods(backbone: Backbone, caches: Caches) -> list[Method]:
    """Those that the network may be trained by, in the order of the tables: a network without
    attention blocks by its last layer and as a whole; LoRA where peft is installed.

    Args:
        caches: for what the frozen network gives to VQT's queries.

    Raises:
        ValueError, ImportError: as :attr:`Backbone.source`.
    """
    source = backbone.source

    def build(*configs: Any, before: Callable[[nn.Module], object] = lambda model: None):
        def built(num_classes: int, seed: int) -> nn.Module:
            model = backbone.build(num_classes, seed)
            with seeded(seed):
                before(model)
                for config in configs:
                    apply(model, config)
            return Prepared(model)

        return built

    def cached(model: nn.Module, split: Split) -> Split:
        return caches.split(backbone.name, model.get_submodule("module"), split)

    probe = Method("linear probe", build(LinearProbeConfig()), prepare_data=_features)
    full = Method("full fine-tuning", backbone.build, EVERYTHING)
    try:
        attention_blocks(source)
    except ValueError:
        return [probe, full]
    vqt = Method("VQT", build(VQTConfig()), prepare_data=cached, prepare_test=False)
    on_top = VQTConfig(train_backbone=True)
    lora = [
        Method("LoRA", build(before=_lora), INSIDE),
        Method("VQT + LoRA", build(on_top, before=_lora), INSIDE),
    ]
    return [
        probe,
        Method("Head2Toe", build(Head2ToeConfig()), prepare_data=_features),
        vqt,
        dataclasses.replace(vqt, name="VQT (half kept)", finish=_select),
        Method("VPT-deep", build(VPTConfig()), INSIDE),
        Method("AdaptFormer", build(AdaptFormerConfig()), INSIDE),
        Method("VQT + AdaptFormer", build(AdaptFormerConfig(), on_top), INSIDE),
        Method(
            "VQT + AdaptFormer (4 bits)",
            build(LowBitConfig(bits=4), AdaptFormerConfig(), on_top),
            INSIDE,
        ),
        *(lora if importlib.util.find_spec("peft") else []),
        full,
    ]


class Prepared(nn.Module):
    """A model that also takes, in the place of images, what :func:`_features` or
    :class:`Caches` made of them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model

    def get_classifier(self) -> Any:
        """The model's own."""
        return classifier(self.module)[1]

    def forward(self, x: Tensor | CachedBatch) -> Tensor:
        if isinstance(x, CachedBatch):
            return FromCache(self.module)(x)
        if x.dim() == 2:
            return OnFeatures(linear_of(self.get_classifier()))(x)
        return self.module(x)


def _features(model: nn.Module, split: Split) -> Split:
    """What reaches the linear classifier, [n, D], for every image."""
    return Split(collect(model, split.images).cpu(), split.labels)


def _select(model: nn.Module, split: Split, settings: Settings) -> nn.Module:
    """Half the learning rate, as the paper has it."""
    half = dataclasses.replace(settings, learning_rate=settings.learning_rate / 2)
    select_features(model, split, SELECTED, half, progress=False)
    return model


def _lora(model: nn.Module) -> None:
    """Low-rank updates of the projections to queries, keys and values, and the classifier."""
    import peft

    peft.inject_adapter_in_model(
        peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["qkv"]), model
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    linear_of(classifier(model)[1]).requires_grad_(True)
