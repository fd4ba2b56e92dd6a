"""Head2Toe: the head reads means of every block's tokens, and nothing else is kept."""

import copy

import pytest
import torch

import memtl
from memtl import Head2ToeConfig, VQTConfig
from memtl.methods.base.transfer import owned
from memtl.methods.head2toe import pooled
from tests.helpers import assert_same
from tests.methods.models import (
    CLASSES,
    DEPTH,
    NAMES,
    PATCHES,
    WIDTH,
    assert_close,
    build,
    feature,
    gradients,
    head_of,
    images,
    logits,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")


def test_means_over_runs():
    x = torch.randn(2, 12, 5)
    assert_close(pooled(x, 1), x.mean(1, keepdim=True))
    assert_close(pooled(x, 4), x.unflatten(1, (4, 3)).mean(2))
    assert_same(pooled(x, 12), x)
    # 12 / 5: from floor(12 i / 5) to ceil(12 (i + 1) / 5)
    runs = [(0, 3), (2, 5), (4, 8), (7, 10), (9, 12)]
    assert_close(pooled(x, 5), torch.stack([x[:, a:b].mean(1) for a, b in runs], 1))
    with pytest.raises(ValueError, match="at most the 12 tokens of a block, got 13"):
        pooled(x, 13)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pool", [1, 3])
def test_logits_by_the_formula(pool, normalize):
    model, x = build(), images(3)
    z, chunks = [], [feature(model, x)]
    hooks = [b.register_forward_hook(lambda block, args, out: z.append(out)) for b in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    chunks += [pooled(tokens, pool).flatten(1) for tokens in z]
    memtl.apply(model, Head2ToeConfig(pool=pool, normalize=normalize))
    if normalize:
        chunks = [c / c.norm(dim=-1, keepdim=True) for c in chunks]
    linear = model.head.linear
    assert_close(model(x), torch.cat(chunks, -1) @ linear.weight.T + linear.bias)


@pytest.mark.parametrize("name", NAMES)
def test_the_feature_is_that_of_the_unmodified_model(name):
    model, x = build(name), images()
    with torch.no_grad():
        before = feature(model, x)
    memtl.apply(model, Head2ToeConfig(pool=3))
    assert_same(feature(model.train(), x), before)


@pytest.mark.parametrize("count", [1, 3])
def test_the_head_has_the_size_of_that_of_vqt(count):
    a, b = build(), build()
    memtl.apply(a, Head2ToeConfig(pool=count))
    memtl.apply(b, VQTConfig(num_queries=count))
    assert a.head.linear.sizes == b.head.linear.sizes
    assert a.head.linear.weight.shape == (CLASSES, WIDTH + DEPTH * count * WIDTH)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_tokens_is_kept(name):
    kept = []
    for size in (32, 64):
        model, x = build(name, size), images(2, size)
        memtl.apply(model, Head2ToeConfig(pool=3))
        kept.append(memtl.memory.saved_bytes(lambda m=model, x=x: logits(m, x)))
    features = head_of(model).linear.weight.shape[1]
    beside = 2 * (DEPTH + 1) * (CLASSES + 3)  # of each chunk logits, norm, its clamp
    assert kept[0] == kept[1]
    assert 4 * 2 * features <= kept[0] <= 4 * (2 * features + beside)


def test_more_means_than_tokens():
    model = build()
    memtl.apply(model, Head2ToeConfig(pool=PATCHES + 2))
    with pytest.raises(ValueError, match=f"at most the {PATCHES + 1} tokens"):
        model(images())


def test_a_selected_head():
    model, x = build(), images()
    other = copy.deepcopy(model)
    memtl.apply(model, Head2ToeConfig(pool=2))
    memtl.apply(other, Head2ToeConfig(pool=2, selected=7))
    index = torch.randperm(5 * WIDTH)[:7].sort().values
    with torch.no_grad():
        other.head.linear.selected.copy_(index)
        other.head.linear.weight.copy_(model.head.linear.weight[:, index])
        kept = torch.zeros_like(model.head.linear.weight)
        kept[:, index] = 1
        model.head.linear.weight.mul_(kept)
    assert_close(logits(other, x), logits(model, x))
    names = {f"head.linear.{n}" for n in ("weight", "bias", "selected")}
    assert set(owned(other)) == names


def test_outside_of_the_model_and_checkpointed():
    model, x = build(), images()
    memtl.apply(model, Head2ToeConfig())
    with pytest.raises(RuntimeError, match="call the model as a whole"):
        model.head(torch.zeros(2, WIDTH))
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="cannot be checkpointed"):
        model(x)
    model.set_grad_checkpointing(False)
    assert set(gradients(model, x)) == {"head.linear.weight", "head.linear.bias"}


def test_features_can_be_selected():
    model = build()
    memtl.apply(model, Head2ToeConfig(pool=2))
    from memtl.tasks import Split
    from memtl.training import Settings

    split = Split(images(24), torch.arange(24) % CLASSES)
    settings = Settings(steps=4, batch_size=8, learning_rate=1e-2)
    selection = memtl.select_features(model, split, 0.2, settings, progress=False)
    assert len(selection.kept) == WIDTH
    assert memtl.methods.applied(model) == (Head2ToeConfig(num_classes=5, pool=2, selected=WIDTH),)
    assert set(gradients(model, images())) == {"head.linear.weight", "head.linear.bias"}
