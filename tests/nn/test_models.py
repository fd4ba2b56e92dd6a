"""Whole models of timm and transformers: same forward, fewer bytes, usable gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

import memtl
from memtl.memory import MIB, saved_bytes
from tests.helpers import grad_like

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def check(model, inputs, least_ratio, config=None, worst_cosine=0.9):
    """Convert ``model``: the forward must not change, the bytes must fall, exactly trained vectors
    must keep their direction. Returns the report."""
    model.train()

    def forward(seed=5):
        torch.manual_seed(seed)
        return tensor_of(model(**inputs))

    def gradients():
        model.zero_grad()
        out = forward()  # along a fixed direction: after a norm, the mean square is a constant
        out.backward(grad_like(out))
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, exact = forward(), gradients()
    keys = list(model.state_dict())
    stock = saved_bytes(forward)
    report = memtl.apply(model, config or memtl.BackRazorConfig(keep=0.1))
    assert torch.equal(forward(), expected)
    assert list(model.state_dict()) == keys
    converted = saved_bytes(forward)
    assert stock / converted >= least_ratio, f"{stock} / {converted} = {stock / converted:.2f}"
    found = gradients()
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert found[name].isfinite().all(), name
        if gradient.dim() == 1 and gradient.norm() > 1e-5 * max(g.norm() for g in exact.values()):
            cosine = F.cosine_similarity(gradient, found[name], dim=0).item()
            assert cosine > worst_cosine, (name, cosine)
    return report


def tiny_vit(**options):
    return timm.models.VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4,
           "num_classes": 10, **options}
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"drop_rate": 0.1, "attn_drop_rate": 0.1}, {"qk_norm": True}, {"reg_tokens": 2},
     {"drop_path_rate": 0.2, "init_values": 1.0}],
    ids=["plain", "dropout", "qk-norm", "registers", "drop-path"],
)  # fmt: skip
def test_timm_vision_transformer(options):
    images = torch.randn(4, 3, 32, 32)
    ratio = 4 if "drop_path_rate" in options else 5  # layer scale keeps its input: no layer for it
    report = check(tiny_vit(**options), {"x": images}, ratio if "init_values" not in options else 3)
    names = {row.name for row in report.converted}
    assert {"patch_embed.proj", "blocks.0.attn", "blocks.0.attn.qkv", "head"} <= names


def test_timm_attention_without_the_fused_kernel():
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    check(model, {"x": torch.randn(4, 3, 32, 32)}, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 2}),
        ("beit_base_patch16_224", {"embed_dim": 64, "num_heads": 4, "depth": 2}),
        ("eva02_tiny_patch14_224", {"depth": 2}),
    ],
)
def test_timm_relatives(name, options):
    size = 32 if "14" not in name else 28
    model = timm.create_model(name, img_size=size, num_classes=10, **options)
    check(model, {"x": torch.randn(2, 3, size, size)}, 2)


TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def ids(batch=3, length=17):
    return torch.randint(0, 99, (batch, length))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert(attention):
    config = transformers.BertConfig(**TEXT, intermediate_size=128, attn_implementation=attention)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, 9:] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask}
    check(transformers.BertModel(config), inputs, 6 if attention == "sdpa" else 4)


def test_gpt2_with_tied_weights():
    config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    report = check(model, {"input_ids": ids(), "use_cache": False}, 6)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {"Conv1D", "NewGELUActivation"} <= {row.kind for row in report.converted}


def test_llama_with_grouped_heads():
    config = transformers.LlamaConfig(**TEXT, intermediate_size=128, num_key_value_heads=2)
    report = check(
        transformers.LlamaForCausalLM(config), {"input_ids": ids(), "use_cache": False}, 3
    )
    assert "LlamaRMSNorm" in {row.kind for row in report.converted}


def test_rms_norms_written_like_llama_s_and_gemma_s_are_known():
    text = {**TEXT, "intermediate_size": 128}
    mistral = transformers.MistralModel(transformers.MistralConfig(**text, num_key_value_heads=2))
    report = memtl.apply(mistral, memtl.BackRazorConfig())
    assert "MistralRMSNorm" in {row.kind for row in report.converted}
    gemma = transformers.GemmaModel(
        transformers.GemmaConfig(**text, num_key_value_heads=2, head_dim=16)
    )
    report = memtl.apply(gemma, memtl.BackRazorConfig())
    assert "GemmaRMSNorm" in {row.kind for row in report.converted}  # multiplies by 1 + weight


@pytest.mark.parametrize("kind", ["ViT", "CLIPVision"])
def test_transformers_vision(kind):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config)
    check(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, 5)


def test_lora_of_peft_before_the_conversion():
    peft = pytest.importorskip("peft")
    base = transformers.BertModel(transformers.BertConfig(**TEXT, intermediate_size=128))
    config = peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.1)
    check(peft.get_peft_model(base, config), {"input_ids": ids()}, 4)


def test_the_paper_preset_on_a_vision_transformer():
    config = memtl.BackRazorConfig.preset("paper", keep=0.1)
    check(tiny_vit(), {"x": torch.randn(4, 3, 32, 32)}, 2.5, config, worst_cosine=-1)


def test_the_preset_s_formats_are_what_is_kept():
    model = tiny_vit()
    images = torch.randn(2, 3, 32, 32)
    config = memtl.BackRazorConfig(keep=0.1)
    memtl.apply(model, config)
    with memtl.memory.SavedTensors(model) as saved:
        out = model(images)
    formats = config.formats()
    tokens = torch.Size((2, 17, 64))
    hidden = torch.Size((2, 17, 256))
    kept = saved.by_layer
    for i in range(2):
        assert kept[f"blocks.{i}.attn.qkv"] == formats["linear"].nbytes(tokens, torch.float32)
        assert kept[f"blocks.{i}.mlp.fc2"] == formats["linear"].nbytes(hidden, torch.float32)
        rows = 2 * 17 * 4  # rstd
        assert kept[f"blocks.{i}.norm1"] == formats["norm"].nbytes(tokens, torch.float32) + rows
        assert kept[f"blocks.{i}.attn"] == 3 * formats["attention"].nbytes(tokens, torch.float32)
        assert kept[f"blocks.{i}.mlp.act"] == (2 * 17 * 256) // 2
    del out


@pytest.fixture(scope="module")
def vit_base():
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224").train()


def test_vit_base_stock(vit_base):
    assert saved_bytes(vit_base, torch.randn(1, 3, 224, 224)) / MIB == pytest.approx(112.7, abs=0.1)


@pytest.mark.parametrize(("keep", "most"), [(0.1, 12.5), (0.03, 11.0)])
def test_vit_base_fast(vit_base, keep, most):
    images = torch.randn(1, 3, 224, 224)
    expected = vit_base(images)
    memtl.apply(vit_base, memtl.BackRazorConfig(keep=keep))
    try:
        assert torch.equal(vit_base(images), expected)
        assert saved_bytes(vit_base, images) / MIB <= most
    finally:
        memtl.unconvert(vit_base)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_base_sized_language_models(kind):
    config = transformers.AutoConfig.for_model(kind)
    cls = transformers.BertModel if kind == "bert" else transformers.GPT2LMHeadModel
    model = cls(config).train()
    tokens = torch.randint(0, 1000, (1, 128))

    def forward():
        torch.manual_seed(0)  # dropout is on
        return model(tokens, **({} if kind == "bert" else {"use_cache": False}))[0]

    expected, stock = forward(), saved_bytes(forward)
    memtl.apply(model, memtl.BackRazorConfig(keep=0.1))
    assert torch.equal(forward(), expected)
    assert stock / saved_bytes(forward) >= 8


def test_a_training_run_follows_the_exact_one():
    torch.manual_seed(0)
    exact = tiny_vit()
    converted = copy.deepcopy(exact)
    memtl.apply(converted, memtl.BackRazorConfig(keep=0.1))
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))

    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(20):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    first = F.cross_entropy(exact(images), labels).item()
    a, b = train(exact), train(converted)
    assert a < first / 2
    assert b < first / 2


def test_swin_with_its_trained_position_bias():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=32, depths=(2, 2),
        num_heads=(2, 4), num_classes=10, drop_path_rate=0.0,
    )  # fmt: skip
    report = check(model, {"x": torch.randn(2, 3, 32, 32)}, 5)
    assert "layers.0.blocks.1.attn" in {row.name for row in report.converted}


@pytest.mark.parametrize("gated", [False, True])
def test_t5(gated):
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    tokens = ids(2, 11)
    model = transformers.T5ForConditionalGeneration(config)
    report = check(model, {"input_ids": tokens, "labels": tokens}, 1.5)
    assert "T5LayerNorm" in {row.kind for row in report.converted}
    assert not {"Linear", "T5Attention"} & {row.kind for row in report.skipped}


@pytest.mark.parametrize(
    ("kind", "options", "least_ratio"),
    [
        ("Roberta", {}, 5),
        ("DebertaV2", {}, 5),
        ("GPTNeoX", {}, 5),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}, 2.5),
        ("Mistral", {"num_key_value_heads": 2}, 2.5),
    ],
)
def test_more_language_models(kind, options, least_ratio):
    config = getattr(transformers, f"{kind}Config")(**TEXT, intermediate_size=128, **options)
    check(getattr(transformers, f"{kind}Model")(config), {"input_ids": ids()}, least_ratio)


def test_llama_with_padding_on_the_left():
    """Rows of the mask in which nothing takes part."""
    config = transformers.LlamaConfig(**TEXT, intermediate_size=128, num_key_value_heads=2)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, :9] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask, "use_cache": False}
    check(transformers.LlamaForCausalLM(config), inputs, 2.5)
    paper = memtl.BackRazorConfig.preset("paper", keep=0.5)
    check(transformers.LlamaForCausalLM(config), inputs, 1, paper, worst_cosine=-1)


def test_lora_of_peft_after_the_conversion():
    peft = pytest.importorskip("peft")
    base = transformers.BertModel(transformers.BertConfig(**TEXT, intermediate_size=128))
    tokens = ids()

    def forward(model):
        torch.manual_seed(0)
        return model(tokens)[0]

    expected = forward(base)
    memtl.apply(base, memtl.BackRazorConfig())
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query", "value"]))
    assert torch.equal(forward(model), expected)  # LoRA begins as the identity
    forward(model).square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_gradient_before_anything_lossy_is_stock():
    """The head's bias and input: nothing between the loss and them was approximated."""
    stock = tiny_vit()
    converted = copy.deepcopy(stock)
    memtl.apply(converted, memtl.BackRazorConfig(keep=0.1))
    images = torch.randn(4, 3, 32, 32)
    features, biases = [], []
    for model in (stock, converted):
        before = model.forward_head(model.forward_features(images), pre_logits=True)
        before.retain_grad()
        model.head(before).square().sum().backward()
        features.append(before.grad)
        biases.append(model.head.bias.grad)
    torch.testing.assert_close(*features)
    torch.testing.assert_close(*biases)


def test_an_unconverted_model_in_the_same_process_is_unaffected():
    stock, other = tiny_vit(), tiny_vit()
    images = torch.randn(2, 3, 32, 32)
    before = saved_bytes(stock, images)
    loss = stock(images).square().sum()
    expected = torch.autograd.grad(loss, list(stock.parameters()))
    memtl.apply(other, memtl.BackRazorConfig())
    other(images).sum().backward()
    assert saved_bytes(stock, images) == before
    loss = stock(images).square().sum()
    for a, b in zip(torch.autograd.grad(loss, list(stock.parameters())), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_whole_models_compile_as_one_graph(kind):
    if kind == "vit":
        model, inputs = tiny_vit(depth=1), {"x": torch.randn(2, 3, 32, 32)}
    else:
        config = transformers.GPT2Config(
            vocab_size=99, n_embd=64, n_layer=1, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
        )
        model = transformers.GPT2Model(config).train()
        inputs = {"input_ids": ids(2, 9), "use_cache": False}
    memtl.apply(model, memtl.BackRazorConfig())
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = tensor_of(call(**inputs))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        assert eager.shape == compiled.shape
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


def test_a_converted_vit_under_its_own_gradient_checkpointing():
    model = tiny_vit()
    images = torch.randn(2, 3, 32, 32)
    memtl.apply(model, memtl.BackRazorConfig())
    grads = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    kept = saved_bytes(model, images)
    model.set_grad_checkpointing(False)
    assert kept < saved_bytes(model, images)
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_converted_vit_in_evaluation_keeps_nothing():
    model = tiny_vit()
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images)
    memtl.apply(model, memtl.BackRazorConfig())
    with torch.no_grad():
        assert torch.equal(model(images), expected)
        assert saved_bytes(model, images) == 0
    with torch.inference_mode():
        assert torch.equal(model(images), expected)
