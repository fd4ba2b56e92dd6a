"""Small networks for the tests of tickets, and what is checked of every one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtl.nn.masked import masked_weights
from memtl.reference.bits import bits_unpack

WIDTH, WORDS = 32, 40


def bert(kind: str = "ForSequenceClassification", **options) -> nn.Module:
    """Two layers of 32 features; words [B, N]."""
    import transformers

    sizes = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, vocab_size=WORDS, max_position_embeddings=16)
    config = transformers.BertConfig(**{**sizes, **options})
    return getattr(transformers, f"Bert{kind}")(config)


def words(batch: int = 4) -> Tensor:
    return torch.randint(0, WORDS, (batch, 6))


def vit() -> nn.Module:
    """Two blocks; images [B, 3, 16, 16]."""
    import timm

    sizes = dict(img_size=16, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)


def convs() -> nn.Module:
    """Convolutions of every kind, odd sizes; images [B, 3, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Conv2d(7, 7, 3, groups=7, bias=False),
        nn.ConvTranspose2d(7, 5, 2, stride=2),
        nn.Flatten(2),
        nn.Conv1d(5, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 142, 3),
    )


NETWORKS = {
    "bert": (bert, words),
    "vit": (vit, lambda: torch.randn(4, 3, 16, 16)),
    "convs": (convs, lambda: torch.randn(4, 3, 8, 8)),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network and its input, of random numbers none of which is zero."""
    make, data = NETWORKS[name]
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, data()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    y = y if isinstance(y, Tensor) else y.logits
    return (y - 1).square().mean()


def pruned(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Every masked weight of ``model``, and where it is pruned."""
    found = {}
    for name, key, module, bits in masked_weights(model):
        weight = getattr(module, key)
        found[f"{name}.{key}"] = weight, ~bits_unpack(bits, weight.numel()).view(weight.shape)
    return found


def assert_zero(model: nn.Module, gradients: bool = True) -> None:
    """What is pruned is exactly zero, what is left is not (but for one number in a hundred), in
    weights, and in gradients where there are any."""
    weights = pruned(model)
    assert weights
    for name, (weight, where) in weights.items():
        assert where.any() and not where.all(), name
        assert (weight[where] == 0).all(), name
        assert (weight[~where] != 0).float().mean() > 0.99, name
        if gradients:
            assert weight.grad is not None, name
            assert (weight.grad[where] == 0).all(), name
            assert weight.grad[~where].any(), name
