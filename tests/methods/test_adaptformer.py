"""AdaptFormer: nothing at first, then the released code's formula."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl import AdaptFormerConfig
from tests.helpers import assert_same
from tests.methods.models import (
    NAMES,
    WIDTH,
    assert_close,
    build,
    gradients,
    images,
    logits,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")


def adapted(model, spread=0.0, **fields):
    """With what starts at zero drawn with that deviation."""
    memtl.apply(model, AdaptFormerConfig(**{"bottleneck": 8, "dropout": 0.0, **fields}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapter" in name and (name.endswith("bias") or "up" in name):
                p.normal_(0, spread)
    return model


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_at_first_the_model_is_what_it_was(name, mode):
    model, x = build(name), images()
    with torch.no_grad():  # torch may choose another kernel where a mask takes a gradient
        before = logits(model, x)
    memtl.apply(model, AdaptFormerConfig())
    model.train(mode)
    assert_same(logits(model, x), before)


def test_initialisation():
    model = build()
    memtl.apply(model, AdaptFormerConfig(bottleneck=64))
    adapter = model.blocks[1].adapter
    assert adapter.down.weight.shape == (64, WIDTH) and adapter.up.weight.shape == (WIDTH, 64)
    bound = 1 / math.sqrt(WIDTH)  # Kaiming's, a = sqrt(5)
    assert 0.98 * bound < adapter.down.weight.abs().max() <= bound
    for zero in (adapter.down.bias, adapter.up.weight, adapter.up.bias):
        assert not zero.any()
    assert "scale=0.1, dropout=0.1" in repr(adapter)


def adapters_formula(adapter, x, scale):
    return scale * adapter.up(torch.relu(adapter.down(x)))


def plain_block(block, x, scale):
    """A block of timm's, of transformers' ViT, or one that normalises what attention and MLP give;
    with its adapter, written out."""
    kind = type(block).__name__
    if kind == "Block":
        x = x + block.ls1(block.attn(block.norm1(x)))
        return x + block.ls2(block.mlp(block.norm2(x))) + adapters_formula(block.adapter, x, scale)
    if kind == "ResPostBlock":
        x = x + block.norm1(block.attn(x))
        return x + block.norm2(block.mlp(x)) + adapters_formula(block.adapter, x, scale)
    x = x + block.attention(block.layernorm_before(x))[0]
    mlp = block.mlp(block.layernorm_after(x))
    return x + mlp + adapters_formula(block.adapter, x, scale)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_rpn_224", "ViT"],
)
def test_a_block_and_its_gradients_by_the_formula(name):
    model = adapted(build(name), spread=0.5, scale=0.3)
    blocks = model.vit.layers if name == "ViT" else model.blocks
    other = copy.deepcopy(blocks[1])
    x = torch.randn(3, 17, WIDTH)
    y = blocks[1](x)
    expected = plain_block(other, x, 0.3)
    assert_close(y, expected)
    grad_out = torch.randn_like(y)
    y.backward(grad_out)
    expected.backward(grad_out)
    for (key, p), q in zip(blocks[1].named_parameters(), other.parameters(), strict=True):
        assert p.requires_grad == ("adapter" in key) == (p.grad is not None)
        if p.requires_grad:
            assert_close(p.grad, q.grad)


def test_dropout_is_inside_the_adapter_in_training():
    model = adapted(build(), spread=1.0, dropout=0.25).train()
    adapter, x = model.blocks[0].adapter, torch.randn(2, 17, WIDTH)
    torch.manual_seed(0)
    y = adapter(x)
    torch.manual_seed(0)
    middle = F.dropout(torch.relu(adapter.down(x)), 0.25)
    assert_close(y, adapter.up(middle) * 0.1)
    assert not torch.equal(adapter(x), y)
    model.eval()
    assert_same(adapter(x), adapter(x))


def test_stochastic_depth_does_not_concern_the_adapter():
    """It does not happen in evaluation mode; a block put into training drops the MLP's branch."""
    model = adapted(build(drop_path_rate=0.5), spread=1.0)
    block, x = model.blocks[1], torch.randn(1, 17, WIDTH)
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1 - 1e-12  # of both branches
    block.train()
    assert_close(block(x), x + adapters_formula(block.adapter, x, 0.1))


def test_a_run_that_fails_leaves_nothing_behind():
    model, x = adapted(build(), spread=1.0), images()
    expected = logits(model, x)
    failing = model.blocks[0].mlp.fc1.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(3))
    failing.remove()
    assert_same(logits(model, x), expected)
    assert all(block.adapter.state.now.adding is None for block in model.blocks)


def test_blocks_whose_mlp_is_not_to_be_told():
    for change in ({"mlp": None}, {"norm3": nn.LayerNorm(WIDTH)}):
        model = build()
        for name, module in change.items():
            if module is None:
                delattr(model.blocks[1], name)
            else:
                setattr(model.blocks[1], name, module)
        with pytest.raises(ValueError, match="cannot tell where the MLP of a Block begins"):
            memtl.apply(model, AdaptFormerConfig())
        assert all(p.requires_grad for p in model.parameters())


def test_converting_afterwards_reaches_the_adapters():
    model, x = adapted(build(), spread=1.0), images(8)
    expected, stock = logits(model, x), memtl.memory.saved_bytes(lambda: model(x))
    report = memtl.apply(model, memtl.LowBitConfig())
    assert {f"blocks.0.adapter.{n}" for n in ("down", "up")} < {
        row.name for row in report.converted
    }
    assert_same(logits(model, x), expected)
    assert memtl.memory.saved_bytes(lambda: model(x)) < stock / 2
    assert all(g.abs().sum() > 0 for g in gradients(model, x).values())
