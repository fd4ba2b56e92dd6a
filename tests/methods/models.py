"""Small vision transformers of every kind, with random weights: two blocks, 32 features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, DEPTH, CLASSES = 32, 2, 2, 5
PATCHES = 16
"""Of an image of :func:`images`."""

TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},
    "beit_base_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_small_patch16_dinov3": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_224.mae": {"global_pool": "avg"},
    "vit_relpos_small_patch16_224": {},
    "vit_base_patch16_rpn_224": {},
}
TRANSFORMERS = ("ViT", "Dinov2")
NAMES = (*TIMM, *TRANSFORMERS)


def build(name: str = "vit_tiny_patch16_224", size: int = 32, **options: Any) -> nn.Module:
    """The model of that name, in evaluation mode, with weights that leave nothing at zero or one,
    for images of ``size``.

    ``options`` are timm's or those of transformers' configuration.
    """
    if name in TRANSFORMERS:
        import transformers

        sizes = dict(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=DEPTH)
        sizes.update(intermediate_size=4 * WIDTH, image_size=size, patch_size=8)
        options = {**sizes, "num_labels": CLASSES, "attn_implementation": "sdpa", **options}
        config = getattr(transformers, f"{name}Config")(**options)
        model = getattr(transformers, f"{name}ForImageClassification")(config)
    else:
        import timm

        sizes = dict(embed_dim=WIDTH, num_heads=HEADS, depth=DEPTH, img_size=size, patch_size=8)
        options = {**sizes, "num_classes": CLASSES, **TIMM.get(name, {}), **options}
        model = timm.create_model(name, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def images(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def head_of(model: Any) -> nn.Module:
    return model.classifier if hasattr(model, "classifier") else model.head


def feature(model: nn.Module, x: Tensor) -> Tensor:
    """What the classifier of ``model`` is given."""
    given: list[Tensor] = []
    with head_of(model).register_forward_pre_hook(lambda module, args: given.append(args[0])):
        logits(model, x)
    return given[0].detach().clone()


def gradients(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Of a fixed random combination of the logits, by name."""
    model.zero_grad(set_to_none=True)
    y = logits(model, x)
    generator = torch.Generator().manual_seed(seed)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the norm of ``expected``."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, error
