"""Visual Query Tuning: tokens untouched and unkept, the gradients of the plain formula."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl import VQTConfig
from memtl.methods.base.transfer import owned
from tests.helpers import assert_same
from tests.methods.models import (
    CLASSES,
    DEPTH,
    HEADS,
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
    trained,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")

COMBINES = ["concat", "mean", "weighted"]
KEEPS = ["jacobian", "kv"]


def vqt(name="vit_tiny_patch16_224", size=32, options=None, **fields):
    model = build(name, size, **(options or {}))
    memtl.apply(model, VQTConfig(**{"num_queries": 3, "dropout": 0.0, **fields}))
    return model


# --- the model around the queries


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_the_feature_is_that_of_the_unmodified_model(name, mode):
    model, x = build(name), images()
    with torch.no_grad():  # torch may choose another kernel where a mask takes a gradient
        before = feature(model, x)
    memtl.apply(model, VQTConfig(num_classes=7, num_queries=3))
    model.train(mode)
    assert_same(feature(model, x), before)
    y = logits(model, x)
    assert y.shape == (2, 7)
    y.sum().backward()
    queries = head_of(model).queries
    assert queries.shape == (DEPTH, 3, WIDTH)
    assert (queries.grad.abs().sum((1, 2)) > 0).all()


def test_blocks_alone_do_what_they_did():
    model, x = build(), images()
    before = model.forward_features(x)
    memtl.apply(model, VQTConfig())
    assert_same(model.forward_features(x), before)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ViT"])
def test_queries_and_head_train_and_nothing_else(name):
    model = build(name)
    classifier = "classifier" if name == "ViT" else "head"
    keys = {k for k in model.state_dict() if not k.startswith(f"{classifier}.")}
    report = memtl.apply(model, VQTConfig(num_queries=3, num_classes=7))
    names = {f"{classifier}.{n}" for n in ("queries", "linear.weight", "linear.bias")}
    assert trained(model) == set(owned(model)) == names
    assert set(model.state_dict()) == keys | names
    assert set(gradients(model, images())) == names
    width = WIDTH + DEPTH * 3 * WIDTH
    assert report.count == DEPTH * 3 * WIDTH + 7 * width + 7
    assert f"trainable params: {report.count:,}" in str(report)
    assert f"[7, {width}]" in str(report)


def test_the_model_believes_its_new_number_of_classes():
    assert vqt(num_classes=7).num_classes == vqt("ViT", num_classes=7).num_labels == 7
    assert vqt().num_classes == CLASSES


def test_the_backbone_stays_in_evaluation_mode():
    model = vqt(options={"drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5})
    x = images()
    expected = logits(model, x)
    assert model.train() is model
    assert model.training and model.head.training and model.head.linear.training
    assert not any(m.training for m in model.blocks.modules())
    assert_same(logits(model, x), expected)
    assert model.eval() is model and not any(m.training for m in model.modules())


def test_dropout_takes_entries_of_queries_in_training_for_each_sample():
    model = vqt(num_queries=40, dropout=0.25)
    head = model.head
    assert_same(head.queries_of(1, 2)[0], head.queries[1])
    model.train()
    dropped = head.queries_of(1, 3)
    gone = dropped == 0
    torch.testing.assert_close(dropped[~gone], (head.queries[1].expand(3, -1, -1) / 0.75)[~gone])
    assert abs(gone.float().mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / gone.numel())
    assert not torch.equal(gone[0], gone[1])
    x = images()
    assert not torch.equal(logits(model, x), logits(model, x))
    model.eval()
    assert_same(logits(model, x), logits(model, x))


# --- the formula


def plain_block(block, queries, tokens):
    """Z' = Block(queries; keys and values of tokens), written out for a block of timm's."""
    attention = block.attn

    def heads(x):
        qkv = attention.qkv(block.norm1(x))
        return qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    q = heads(queries)[0]
    _, k, v = heads(tokens)
    p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    x = queries + block.ls1(attention.proj((p @ v).transpose(1, 2).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def plain(model, config, parameters, x):
    """Logits of VQT on an unmodified model of timm's."""
    queries, weights, w, b = parameters
    inputs = []
    hooks = [
        block.register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
        for block in model.blocks
    ]
    with torch.no_grad():
        chunks = [feature(model, x)]
    for hook in hooks:
        hook.remove()
    for m, (block, z) in enumerate(zip(model.blocks, inputs, strict=True)):
        found = plain_block(block, queries[m].expand(len(x), -1, -1), z)
        if config.combine == "concat":
            chunks.append(found.flatten(1))
        elif config.combine == "mean":
            chunks.append(found.mean(1))
        else:
            chunks.append((weights[m][:, None] * found).sum(1))
    if config.normalize:
        chunks = [c / c.norm(dim=-1, keepdim=True) for c in chunks]
    return torch.cat(chunks, -1) @ w.mT + b


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_logits_and_gradients_are_those_of_the_plain_formula(name, combine, keep):
    check_against_plain(name, VQTConfig(num_queries=3, dropout=0, combine=combine, keep=keep))


def test_without_normalisation():
    check_against_plain(
        "vit_tiny_patch16_224", VQTConfig(num_queries=3, dropout=0, normalize=False)
    )


def check_against_plain(name, config):
    model, x = build(name), images(3)
    original = copy.deepcopy(model)
    memtl.apply(model, config)
    head = model.head
    if head.weights is not None:
        nn.init.normal_(head.weights)
    own = [head.queries, head.weights, head.linear.weight, head.linear.bias]
    copies = [None if p is None else p.detach().clone().requires_grad_() for p in own]
    expected = plain(original, config, copies, x)
    y = model(x)
    assert_close(y, expected)
    grad_out = torch.randn_like(y)
    y.backward(grad_out)
    expected.backward(grad_out)
    for p, c in zip(own, copies, strict=True):
        assert (p is None) == (c is None)
        if p is not None:
            assert_close(p.grad, c.grad)


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_to_keep_have_the_same_gradients(name):
    model, x = vqt(name), images()
    head = head_of(model)
    found = []
    for keep in KEEPS:
        head.reader.keep = keep
        found.append(gradients(model, x))
    for key, grad in found[0].items():
        assert_close(found[1][key], grad)


def test_a_rounded_jacobian():
    model = vqt(keep="jacobian", jacobian_dtype="bf16")
    x = images()
    found = gradients(model, x)
    model.head.reader.jacobian = None
    exact = gradients(model, x)
    assert_close(found["head.queries"], exact["head.queries"], tolerance=2**-8)
    assert not torch.equal(found["head.queries"], exact["head.queries"])
    assert_same(found["head.linear.weight"], exact["head.linear.weight"])


# --- what is kept


def saved(model, x):
    return memtl.memory.saved_bytes(lambda: logits(model, x))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_tokens_is_kept(name):
    """Images of four times as many tokens keep not a byte more."""
    small, large = (saved(vqt(name, size=n, keep="jacobian"), images(2, n)) for n in (32, 64))
    assert small == large > 0


@pytest.mark.parametrize("t", [1, 3])
def test_bytes_kept_by_formula(t):
    batch, n, d = 4, PATCHES + 1, WIDTH // HEADS
    x = images(batch)
    bytes_ = {k: saved(vqt(keep=k, num_queries=t), x) for k in (*KEEPS, "auto")}
    jacobian = HEADS * t * d * d
    # q is a view of all three of the queries, k and v are copied out of the tokens'
    kv = 3 * t * WIDTH + 2 * n * WIDTH
    assert bytes_["kv"] - bytes_["jacobian"] == 4 * batch * DEPTH * (kv - jacobian)
    # the norms' means and deviations, what the second norm reads, the activation, the output
    beside = 2 * 2 * t + t * WIDTH + 4 * t * WIDTH + t * WIDTH
    head = WIDTH + (DEPTH + 1) * (CLASSES + 3)  # the feature; of each chunk logits, norm, its clamp
    assert bytes_["jacobian"] <= 4 * batch * (DEPTH * (jacobian + beside) + head)
    assert bytes_["jacobian"] >= 4 * batch * (DEPTH * (jacobian + beside) + WIDTH)
    assert bytes_["auto"] <= min(bytes_["kv"], bytes_["jacobian"])


def test_it_keeps_far_less_than_training_the_model():
    model, x = build(), images(4)
    stock = saved(model, x)
    memtl.apply(model, VQTConfig(dropout=0))
    assert saved(model, x) < stock / 10


# --- surroundings


@pytest.mark.parametrize("combine", COMBINES)
def test_under_autocast(combine):
    model, x = vqt(combine=combine), images()
    expected = logits(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = logits(model, x)
        assert_close(y.float(), expected, tolerance=0.05)
        y.float().sum().backward()
    assert model.head.queries.grad.dtype == torch.float32
    assert model.head.queries.grad.isfinite().all()


def test_a_model_in_bfloat16():
    model = build().to(torch.bfloat16)
    memtl.apply(model, VQTConfig())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(images().bfloat16()).sum().backward()
    assert model.head.queries.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("combine", ["concat", "weighted"])
def test_under_compile(combine):
    torch._dynamo.reset()
    model, x = vqt(combine=combine), images()
    expected = gradients(model, x)
    y = logits(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, x), y)
    for name, grad in gradients(compiled, x).items():
        assert_close(grad, expected[name.removeprefix("_orig_mod.")])
    torch._dynamo.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ViT"])
def test_copies_are_independent(name, copied):
    model, x = vqt(name, num_classes=7), images()
    expected = logits(model, x)
    other = copied(model)
    assert_same(logits(other, x), expected)
    with torch.no_grad():
        head_of(other).queries.zero_()
    assert not torch.equal(logits(other, x), expected)
    assert_same(logits(model, x), expected)
    assert set(gradients(other, x)) == trained(model)
    assert other.train().training and not next(other.children()).training


def test_state_dict_goes_around():
    model, x = vqt(combine="weighted"), images()
    nn.init.normal_(model.head.weights)
    other = vqt(combine="weighted")
    assert not torch.equal(logits(other, x), logits(model, x))
    other.load_state_dict(model.state_dict())
    assert_same(logits(other, x), logits(model, x))


def test_save_and_load(tmp_path):
    model = build()
    pretrained, x = copy.deepcopy(model), images()
    memtl.apply(model, VQTConfig(num_classes=7, combine="weighted"))
    memtl.save(model, tmp_path)
    memtl.load(pretrained, tmp_path)
    assert_same(logits(pretrained, x), logits(model, x))


def test_two_forwards_before_a_backward():
    model = vqt()
    a, b = images(), images(3)
    ya, yb = model(a), model(b)
    (ya.sum() + yb.sum()).backward()
    both = model.head.queries.grad.clone()
    model.zero_grad()
    model(a).sum().backward()
    model(b).sum().backward()
    assert_close(model.head.queries.grad, both)


def test_without_gradients():
    model, x = vqt(), images()
    expected = logits(model, x)
    with torch.no_grad():
        assert_close(logits(model, x), expected)
    with torch.inference_mode():
        assert_close(logits(model, x), expected)


def test_a_mask_of_tokens():
    """Queries read the tokens that the class token reads."""
    model, x = vqt(), images()
    n = PATCHES + 1
    mask = torch.ones(n, n, dtype=torch.bool)
    assert_close(model(x, attn_mask=mask), model(x))
    mask[:, -4:] = False  # nobody reads the last four
    y = model(x, attn_mask=mask)
    x[:, :, -8:] = 0  # which are the lowest row of patches
    assert_close(model(x, attn_mask=mask), y)
    assert not torch.equal(model(x), y)


def test_hidden_states_of_transformers_are_the_tokens():
    model, x = build("ViT"), images()
    before = model(x, output_hidden_states=True).hidden_states
    memtl.apply(model, VQTConfig())
    after = model(x, output_hidden_states=True).hidden_states
    assert len(after) == len(before) == DEPTH + 1
    for a, b in zip(after, before, strict=True):
        assert_same(a, b)


def test_a_run_that_fails_leaves_nothing_behind():
    model, x = vqt(), images()
    expected = logits(model, x)
    with pytest.raises(AssertionError):
        model(images(2, 40))  # images of another size
    failing = model.blocks[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    failing.remove()
    assert_same(logits(model, x), expected)


# --- what is refused


def test_a_head_outside_of_its_model():
    model = vqt()
    with pytest.raises(RuntimeError, match="each of 2 blocks and got it of 0: call the model"):
        model.head(torch.zeros(2, WIDTH))
    with pytest.raises(RuntimeError, match="call the model as a whole"):
        model.forward_head(model.forward_features(images()))
    model(images())
    with pytest.raises(RuntimeError, match="call the model as a whole"):
        model.head(torch.zeros(2, WIDTH))


@pytest.mark.parametrize("train_backbone", [False, True])
def test_checkpointing(train_backbone):
    model = vqt(train_backbone=train_backbone)
    model.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match="cannot be checkpointed"):
        model(images())
    model.set_grad_checkpointing(False)
    model(images()).sum().backward()


def test_checkpointing_of_transformers():
    model, x = vqt("ViT"), images()
    expected = gradients(model, x)
    model.gradient_checkpointing_enable()
    model.train()  # the frozen layers stay in evaluation mode, in which they are not checkpointed
    for name, grad in gradients(model, x).items():
        assert_same(grad, expected[name])
    model = vqt("ViT", train_backbone=True).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="cannot be checkpointed"):
        model(x)
    model.gradient_checkpointing_disable()
    model(x).logits.sum().backward()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "has .* lists of attention blocks"),
        ("hiera_tiny_224", "tokens of this Hiera have several widths"),
        ("cait_xxs24_224", "has no attention blocks"),
        ("resnet18", "has no attention blocks"),
        ("mixer_s32_224", "has no attention blocks"),
        ("samvit_base_patch16", "expected a linear classifier"),
        ("deit_tiny_distilled_patch16_224", "has 2 classifiers"),
    ],
)
def test_other_architectures(name, message):
    import timm

    model = timm.create_model(name)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        memtl.apply(model, VQTConfig(num_classes=3))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not memtl.methods.applied(model)


def test_what_is_no_vision_transformer():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        memtl.apply("vit", VQTConfig())
    with pytest.raises(ValueError, match="no attention blocks"):
        memtl.apply(nn.Sequential(nn.Linear(3, 3)), VQTConfig())
    with pytest.raises(ValueError, match="num_classes must be given"):
        memtl.apply(build(num_classes=0), VQTConfig())
    model = build(num_classes=0)
    memtl.apply(model, VQTConfig(num_classes=4))
    assert logits(model, images()).shape == (2, 4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ViT"])
def test_attention_written_by_hand(name):
    model = build(name, **({"attn_implementation": "eager"} if name == "ViT" else {}))
    if name != "ViT":
        for block in model.blocks:
            block.attn.fused_attn = False
    memtl.apply(model, VQTConfig())
    with pytest.raises(NotImplementedError, match="fused_attn"):
        model(images())


def test_twice():
    model = vqt()
    for config in (VQTConfig(), VQTConfig(train_backbone=True)):
        with pytest.raises(ValueError, match="expected a linear classifier, but head is .*VQTHead"):
            memtl.apply(model, config)
    model(images()).sum().backward()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_queries": 0}, ValueError, "num_queries must be at least 1"),
        ({"num_queries": 1.0}, TypeError, "num_queries must be an int"),
        ({"num_queries": True}, TypeError, "num_queries must be an int"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"dropout": "0"}, TypeError, "dropout must be a number"),
        ({"combine": "sum"}, ValueError, "combine must be one of"),
        ({"keep": "all"}, ValueError, "keep must be one of"),
        ({"jacobian_dtype": "fp16"}, ValueError, "jacobian_dtype must be one of"),
        ({"normalize": None}, TypeError, "normalize must be a bool"),
        ({"train_backbone": 1}, TypeError, "train_backbone must be a bool"),
        ({"selected": 0}, ValueError, "selected must be at least 1"),
    ],
)
def test_fields(fields, error, message):
    with pytest.raises(error, match=message):
        VQTConfig(**fields)


def test_more_features_than_there_are():
    with pytest.raises(ValueError, match=r"selected must be in 1 \.\. 96, got 97"):
        memtl.apply(build(), VQTConfig(selected=3 * WIDTH + 1))


def test_a_selected_head_reads_those_features_alone():
    config = VQTConfig(num_queries=2, dropout=0)
    model, x = build(), images()
    other = copy.deepcopy(model)
    memtl.apply(model, config)
    memtl.apply(other, dataclasses.replace(config, selected=10))
    index = torch.randperm(5 * WIDTH)[:10].sort().values
    with torch.no_grad():
        other.head.linear.selected.copy_(index)
        other.head.queries.copy_(model.head.queries)
        other.head.linear.weight.copy_(model.head.linear.weight[:, index])
        kept = torch.zeros_like(model.head.linear.weight)
        kept[:, index] = 1
        model.head.linear.weight.mul_(kept)
    assert_close(logits(other, x), logits(model, x))
    assert set(owned(other)) == trained(other) | {"head.linear.selected"}


# --- on top of others


@pytest.mark.parametrize(
    "config", [memtl.BackRazorConfig(), memtl.LowBitConfig()], ids=["br", "lb"]
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "ViT"])
def test_on_a_converted_model(name, config):
    """Which trains on, and keeps less than the stock model does."""
    stock, x = vqt(name, train_backbone=True), images()
    before = logits(stock, x)
    model = build(name)
    memtl.apply(model, config)
    memtl.apply(model, VQTConfig(num_queries=3, dropout=0, train_backbone=True))
    assert saved(model, x) < saved(stock, x)
    model.load_state_dict(stock.state_dict())
    assert_close(logits(model, x), before)
    found = gradients(model, x)
    assert set(found) == trained(model)
    assert "blocks.0.attn.qkv.weight" in found or name == "ViT"
    for name_ in ("queries", "linear.weight"):
        assert any(n.endswith(name_) and g.abs().sum() > 0 for n, g in found.items())


def test_training_the_backbone_sends_no_gradient_into_the_tokens():
    """Of a model in evaluation mode its gradients are those of its own feature and of the weights
    that queries pass through: the first block's key weights get theirs from the feature alone."""
    model, x = vqt(train_backbone=True), images()
    with torch.no_grad():
        model.head.linear.weight[:, :WIDTH] = 0  # the feature goes unread
    found = gradients(model, x)
    query, key, value = found["blocks.0.attn.qkv.weight"].chunk(3)
    assert query.abs().max() > 0
    assert key.abs().max() == value.abs().max() == 0
    assert found["patch_embed.proj.weight"].abs().max() == 0


def test_a_converted_model_is_not_converted_back():
    model = build()
    memtl.apply(model, memtl.LowBitConfig())
    memtl.apply(model, VQTConfig())
    with pytest.raises(ValueError, match="was changed by a method after the conversion"):
        memtl.unconvert(model)
    logits(model, images()).sum().backward()


def test_converting_afterwards_and_back():
    model, x = vqt(train_backbone=True), images()
    expected = gradients(model, x)
    memtl.apply(model, memtl.LowBitConfig())
    memtl.unconvert(model)
    for name, grad in gradients(model, x).items():
        assert_same(grad, expected[name])


@pytest.mark.parametrize(
    "config",
    [
        memtl.VPTConfig(num_prompts=4, dropout=0),
        memtl.VPTConfig(num_prompts=4, deep=False, dropout=0),
        memtl.AdaptFormerConfig(bottleneck=4, dropout=0),
    ],
    ids=["vpt", "vpt-shallow", "adaptformer"],
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "ViT"])
def test_on_top_of_another_method(name, config):
    model, x = build(name), images()
    memtl.apply(model, config)
    for n, p in model.named_parameters():
        if "adapter.up" in n:
            nn.init.normal_(p)
    own = {n for n in trained(model) if "vpt" in n or "adapter" in n}
    before = feature(model, x)
    memtl.apply(model, VQTConfig(num_queries=3, dropout=0, train_backbone=True))
    assert_same(feature(model, x), before)
    found = gradients(model, x)
    assert set(found) == trained(model) > own
    assert all(g.abs().sum() > 0 for g in found.values())
    head = head_of(model)
    with torch.no_grad():  # of the queries alone
        head.linear.weight[:, :WIDTH] = 0
    reached = {n for n, g in gradients(model, x).items() if g.abs().sum() > 0}
    assert head.queries.grad.abs().sum() > 0
    assert (own <= reached) == ("adapter" in next(iter(own)))  # queries pass through adapters
    model.train()
    assert head.training and all(m.training for m in model.modules() if "Prompts" in str(type(m)))


def test_queries_read_prompts_and_have_none():
    model, x = build(), images()
    original = copy.deepcopy(model)
    memtl.apply(model, memtl.VPTConfig(num_prompts=4, dropout=0))
    memtl.apply(model, VQTConfig(num_queries=3, dropout=0, train_backbone=True))
    read = []
    hooks = [
        block.register_forward_pre_hook(lambda block, args: read.append(args[0]))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(x)
        for hook in hooks:
            hook.remove()
        assert [z.shape[1] for z in read] == [PATCHES + 1 + 4] * DEPTH
        model.head.reader.arm(model, (x,))
        z = model.forward_features(x)
        found = model.head.reader.take()
        for m, block in enumerate(original.blocks):
            queries = model.head.queries[m].expand(len(x), -1, -1)
            assert_close(found[m], plain_block(block, queries, read[m]))
    assert z.shape[1] == PATCHES + 1


def test_with_lora_of_peft():
    peft = pytest.importorskip("peft")
    model, x = build(), images()
    options = dict(r=2, target_modules=["qkv"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    model = wrapped.get_base_model()
    report = memtl.apply(model, VQTConfig(num_classes=7, num_queries=3, train_backbone=True))
    lora = {n for n in trained(model) if "lora_" in n}
    assert len(lora) == 2 * DEPTH and "lora_A" in str(report)
    names = {"head.queries", "head.linear.weight", "head.linear.bias"}
    assert trained(model) == set(owned(model)) == lora | names
    model.train()
    found = gradients(model, x)
    assert set(found) == lora | names
    assert all(g.abs().sum() > 0 for g in found.values())
    assert wrapped(x).shape == (2, 7)


def test_over_a_frozen_method_it_has_to_train_the_backbone():
    for config in (memtl.VPTConfig(), memtl.AdaptFormerConfig(), memtl.LinearProbeConfig()):
        model = build()
        memtl.apply(model, config)
        before = trained(model)
        with pytest.raises(ValueError, match="was applied already"):
            memtl.apply(model, VQTConfig())
        assert trained(model) == before
        assert isinstance(model.head, nn.Linear)
        assert F.softmax(model(images()), -1).shape == (2, CLASSES)
