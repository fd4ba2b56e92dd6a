"""Visual Prompt Tuning: prompts go in before a block, and out behind it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import memtl
from memtl import VPTConfig
from tests.helpers import assert_same
from tests.methods.models import (
    DEPTH,
    PATCHES,
    WIDTH,
    assert_close,
    build,
    feature,
    gradients,
    images,
    logits,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")

P = 4
ABSOLUTE = {
    "vit_tiny_patch16_224": 1,
    "deit3_small_patch16_224": 1,
    "vit_small_patch14_reg4_dinov2": 5,
    "vit_base_patch16_clip_224": 1,
    "vit_base_patch16_siglip_224": 0,
}
"""Models without rotary positions, and their tokens in front of the patches."""


def prompted(model, **fields):
    memtl.apply(model, VPTConfig(**{"num_prompts": P, "dropout": 0.0, **fields}))
    return model


def plain(model, prompts, x, deep, prefix):
    """What behind the last block of a model of timm's comes out."""
    z = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for m, block in enumerate(model.blocks):
        if deep or m == 0:
            z = torch.cat((z[:, :prefix], prompts[m].expand(len(z), -1, -1), z[:, prefix:]), 1)
        z = block(z)
        if deep or m == DEPTH - 1:
            z = torch.cat((z[:, :prefix], z[:, prefix + P :]), 1)
    return z


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(("name", "prefix"), ABSOLUTE.items())
def test_logits_and_gradients_are_those_of_the_plain_formula(name, prefix, deep):
    original, x = build(name), images(3)
    model = prompted(copy.deepcopy(original), deep=deep)
    prompts = model.vpt.prompts.detach().clone().requires_grad_()
    assert prompts.shape == (DEPTH if deep else 1, P, WIDTH)
    y = model(x)
    expected = original.forward_head(original.norm(plain(original, prompts, x, deep, prefix)))
    assert_close(y, expected)
    grad_out = torch.randn_like(y)
    y.backward(grad_out)
    expected.backward(grad_out)
    assert_close(model.vpt.prompts.grad, prompts.grad)
    assert_close(model.head.weight.grad, original.head.weight.grad)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    "name", [*ABSOLUTE, "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "ViT", "Dinov2"]
)
def test_prompts_that_nobody_reads_change_nothing(name, deep):
    """Of a prompt whose key is far off, in every block: rotary positions are the tokens' own."""
    model, x = build(name), images()
    before = feature(model, x)
    prompted(model, deep=deep)
    masked = []

    class Hide(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            n = args[1].shape[2] if func is F.scaled_dot_product_attention else 0
            if n and args[0].shape[2] == n:  # no pooling by attention
                hidden = torch.zeros(n, dtype=torch.bool)
                hidden[model.vpt.prefix : model.vpt.prefix + P] = True
                masked.append(n)
                kwargs["attn_mask"] = ~hidden.expand(n, n)
            return func(*args, **kwargs)

    with Hide():
        assert_close(feature(model, x), before)
    assert len(masked) == DEPTH and len(set(masked)) == 1
    assert not torch.equal(feature(model, x), before)


@pytest.mark.parametrize("deep", [True, False])
def test_behind_the_blocks_are_the_tokens_that_always_were(deep):
    model = prompted(build(), deep=deep)
    assert model.forward_features(images()).shape == (2, PATCHES + 1, WIDTH)
    wide = []
    for block in model.blocks:
        block.norm1.register_forward_pre_hook(lambda norm, args: wide.append(args[0].shape[1]))
    model(images())
    assert wide == [PATCHES + 1 + P] * DEPTH


def test_initialisation_is_that_of_the_patch_embedding():
    model = prompted(build(), num_prompts=100)
    bound = math.sqrt(6 / (3 * 8 * 8 + WIDTH))
    prompts = model.vpt.prompts.detach()
    assert 0.99 * bound < prompts.max() <= bound
    assert -bound <= prompts.min() < -0.99 * bound
    spread = bound / math.sqrt(3)
    assert abs(prompts.std() / spread - 1) < 6 / math.sqrt(prompts.numel())


def test_dropout_takes_entries_of_prompts_in_training_for_each_sample():
    model = prompted(build(), num_prompts=50, dropout=0.25).train()
    z = torch.randn(2, PATCHES + 1, WIDTH)
    (with_prompts,) = model.vpt.insert(1, model.blocks[1], (z,))
    assert_same(with_prompts[:, :1], z[:, :1])
    assert_same(with_prompts[:, 51:], z[:, 1:])
    dropped = with_prompts[:, 1:51]
    gone = dropped == 0
    expected = model.vpt.prompts[1].expand(2, -1, -1) / 0.75
    torch.testing.assert_close(dropped[~gone], expected[~gone])
    assert abs(gone.float().mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / gone.numel())
    assert not torch.equal(gone[0], gone[1])
    model.eval()
    x = images()
    assert_same(logits(model, x), logits(model, x))


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("beit_base_patch16_224", "blocks.0.attn.relative_position_bias_table"),
        ("vit_relpos_small_patch16_224", "blocks.0.attn.rel_pos.mlp"),
        ("vit_srelpos_small_patch16_224", "shared_rel_pos.mlp"),
    ],
)
def test_relative_positions_are_refused(name, parameter):
    model = build(name)
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=f"a bias for every pair of its own tokens .{parameter}"):
        prompted(model)
    assert model.state_dict().keys() == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_batch_of_any_size_and_images_of_another():
    model = prompted(build(dynamic_img_size=True))
    assert logits(model, images(1)).shape[0] == 1
    assert set(gradients(model, images(3, 48))) == {"vpt.prompts", "head.weight", "head.bias"}
