"""CheckpointConfig: nothing is kept of a block but its input; backward runs it again."""

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import memtl
from memtl import BackRazorConfig, CheckpointConfig, LowBitConfig
from memtl.methods import Config, applied
from memtl.nn.checkpointed import CheckpointedLayer, checkpoint_blocks
from memtl.storage import Dense, Quantized

from .networks import vit

EXACT = CheckpointConfig(bits=None)
CODED = CheckpointConfig()


def images():
    return {"x": torch.randn(3, 3, 16, 16)}


def tokens(**more):
    return {"input_ids": torch.randint(50, (3, 9)), **more}


def mask():
    return (torch.arange(9) < torch.tensor([[9], [5], [7]])).long()


def of_transformers(kind, name, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")
    return getattr(transformers, f"{kind}{name}")(config(vocab_size=50, **sizes)).train()


def bert():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    return of_transformers("Bert", "ForSequenceClassification", **sizes), tokens(
        attention_mask=mask()
    )


def gpt2(**more):
    sizes = dict(n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    options = {"use_cache": False, **more}
    return of_transformers("GPT2", "LMHeadModel", **sizes, **options), tokens()


def t5():
    """Blocks that hand on tuples: a bias that needs a gradient, the encoder's output."""
    sizes = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, use_cache=False)
    model = of_transformers("T5", "ForConditionalGeneration", **sizes)
    return model, tokens(decoder_input_ids=torch.randint(50, (3, 5)), attention_mask=mask())


def vit_with_dropout():
    return vit(proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.3).train(), images()


class Convolutions(nn.Module):
    """A stage of residual blocks with batch norms, each of which overwrites its input."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(F.relu_(x))) + x

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.stage = nn.Sequential(*(self.Block() for _ in range(3)))

    def forward(self, x):
        return self.stage(self.stem(x)).mean((2, 3))


def resnet():
    return Convolutions(), images()


def channels_last_resnet():
    model, inputs = resnet()
    format = torch.channels_last
    return model.to(memory_format=format), {"x": inputs["x"].to(memory_format=format)}


INSIDE = ((), (BackRazorConfig(),), (LowBitConfig(),))
NETWORKS = (vit_with_dropout, bert, gpt2, t5, resnet, channels_last_resnet)


def outcome(model, inputs, *configs, autocast=False):
    """Logits, gradients by name, buffers and the generator's state after a step of a copy."""
    model = copy.deepcopy(model)
    for config in configs:
        memtl.apply(model, config)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**inputs)
        logits = getattr(logits, "logits", logits)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits.float() * direction).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits, gradients, list(model.buffers()), torch.get_rng_state()


def cosines(gradients, others):
    assert gradients.keys() == others.keys()
    return [
        F.cosine_similarity(g.flatten().double(), others[name].flatten().double(), 0).item()
        for name, g in gradients.items()
        if g.norm() > 1e-4  # the bias of keys, to which a softmax is blind
    ]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("inside", INSIDE, ids=["stock", "fast", "low-bit"])
@pytest.mark.parametrize("network", NETWORKS)
def test_running_it_again_gives_what_the_first_run_would_have_kept(network, inside, autocast):
    model, inputs = network()
    expected = outcome(model, inputs, *inside, autocast=autocast)
    exact = CODED if "resnet" in network.__name__ else EXACT  # those overwrite their input
    logits, gradients, buffers, state = outcome(model, inputs, *inside, exact, autocast=autocast)
    torch.testing.assert_close(logits, expected[0], rtol=0, atol=0)
    assert all(map(torch.equal, buffers, expected[2]))
    assert torch.equal(state, expected[3])
    if exact is EXACT and LowBitConfig() not in inside:  # which shares from block to block
        torch.testing.assert_close(gradients, expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_close_to_the_exact_ones(network):
    model, inputs = network()
    expected = outcome(model, inputs)
    logits, gradients, _, _ = outcome(model, inputs, CODED)
    torch.testing.assert_close(logits, expected[0], rtol=0, atol=0)
    found = cosines(gradients, expected[1])
    assert min(found) > 0.95
    assert sum(found) / len(found) > 0.99


class Permuting(nn.Module):
    """Blocks over what ``lay`` makes of the input and of a parameter."""

    def __init__(self, lay, images):
        super().__init__()
        self.lay = lay
        self.query = nn.Parameter(torch.randn(1, 5, 8))
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False) if images else nn.Linear(8, 8)
        layers = self._of_images if images else self._of_tokens
        self.blocks = nn.Sequential(*(nn.Sequential(*layers()) for _ in range(2)))

    @staticmethod
    def _of_images():
        yield nn.Conv2d(8, 8, 3, padding=1, bias=False)  # which a batch norm would take away
        yield from (nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1, bias=False))

    @staticmethod
    def _of_tokens():
        yield from (nn.SiLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x):
        x = self.blocks(self.lay(self, x))
        return x.flatten(2).mean(2) if x.dim() == 4 else x.mean(1)


LAST = torch.channels_last
LAYOUTS = {
    "expanded": (lambda m, x: m.stem(m.query).expand(len(x), -1, -1), False),
    "an expanded parameter": (lambda m, x: m.query.expand(len(x), -1, -1), False),
    "transposed": (
        lambda m, x: m.stem(m.query).expand(len(x), -1, -1).contiguous().transpose(0, 1),
        False,
    ),
    "gaps": (lambda m, x: m.stem(m.query.expand(len(x), -1, -1))[:, ::2], False),
    "windows": (
        lambda m, x: m.stem(m.query).flatten().unfold(0, 8, 4).expand(len(x), -1, -1),
        False,
    ),
    "channels last": (lambda m, x: m.stem(x)[:, :8].contiguous(memory_format=LAST), True),
    "half of the channels, last": (
        lambda m, x: m.stem(x).contiguous(memory_format=LAST).chunk(2, 1)[0],
        True,
    ),
    "half of the channels": (lambda m, x: m.stem(x).chunk(2, 1)[1], True),
}


@pytest.mark.parametrize(
    "inside", [BackRazorConfig(keep=1.0), LowBitConfig(8)], ids=["fast", "low-bit"]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_second_run_is_given_what_lies_as_it_did(name, inside):
    """Layers keep a tensor as it lies: what the second one kept is read as the first one said."""
    lay, images = LAYOUTS[name]
    torch.manual_seed(1)
    model, inputs = Permuting(lay, images).train(), {"x": torch.randn(3, 3, 7, 6)}
    exact = outcome(model, inputs)
    alone = outcome(model, inputs, inside)[1]
    for bits in (None, 8):
        blocks = CheckpointConfig(bits=bits, target_modules=["blocks.0", "blocks.1"])
        logits, gradients, _, _ = outcome(model, inputs, inside, blocks)
        torch.testing.assert_close(logits, exact[0], rtol=0, atol=0)
        if bits is None and isinstance(inside, BackRazorConfig):  # shares nothing between blocks
            torch.testing.assert_close(gradients, alone, rtol=0, atol=0)
        pairs = zip(cosines(gradients, exact[1]), cosines(alone, exact[1]), strict=True)
        assert all(found > min(before, 0.99) - 0.15 for found, before in pairs)


def test_a_gradient_is_that_of_the_block_at_the_input_that_was_kept():
    block = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model = nn.Sequential(block, copy.deepcopy(block))
    x = torch.randn(5, 64)
    format = Quantized(4)
    middle = block(x).detach()
    decoded = format.unpack(format.pack(middle), middle.shape, middle.dtype).requires_grad_()
    expected = torch.autograd.grad(
        model[1](decoded).square().sum(), (decoded, *model[1].parameters())
    )
    checkpoint_blocks(model, format, target_modules=["1"])
    handed_on = model[0](x)
    y = model[1](handed_on)
    upstream = 2 * model[1](decoded.detach()).detach()
    actual = torch.autograd.grad(y, (handed_on, *model[1].parameters()), upstream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, None])
def test_what_is_kept(bits):
    model, inputs = vit(), images()
    memtl.apply(model, CheckpointConfig(bits=bits))
    with memtl.memory.SavedTensors(model) as saved:
        model(**inputs)
    tokens = torch.Size((3, 5, 16))
    each = (Dense() if bits is None else Quantized(bits)).nbytes(tokens, torch.float32)
    assert [saved.by_layer[f"blocks.{i}"] for i in range(3)] == [each] * 3
    assert not any(name.startswith("blocks.0.") for name in saved.by_layer)


def test_what_several_blocks_are_given_is_kept_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x, memory, scale):
            return x + self.linear(x * memory) * scale

    blocks = nn.ModuleList(Block() for _ in range(3))
    checkpoint_blocks(blocks, Quantized(8))
    x, memory = (torch.randn(4, 16, requires_grad=True) * 1 for _ in range(2))
    scale = torch.rand(4, 16)  # needs no gradient: as it is, by reference

    def run(x):
        for block in blocks:
            x = block(x, memory=memory, scale=scale)
        return x

    assert memtl.memory.saved_bytes(run, x) == 4 * Quantized(8).nbytes(x.shape, x.dtype) + (
        scale.numel() * 4
    )


class Counted(TorchDispatchMode):
    """Names of the operators that ran on tensors with data."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if first is not None and first.device.type != "meta":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_is_packed_in_vain_and_the_last_product_is_not_made_again():
    model, inputs = vit(), images()
    memtl.apply(model, BackRazorConfig(target_modules=["blocks"]))
    memtl.apply(model, CODED)
    with Counted() as forward:
        y = model(**inputs)
    assert [n for n in forward.names if "pack" in n] == ["memtl::quant_pack"] * 3
    with Counted() as backward:
        y.sum().backward()
    with Counted() as once:
        model.blocks[0](torch.randn(3, 5, 16))
    products = once.names.count("aten::addmm")
    assert products == 4
    weights = backward.names.count("memtl::topk_weight_grad")
    assert weights == 3 * 4
    assert backward.names.count("aten::addmm") == 3 * 3


def test_the_peak_is_that_of_one_block():
    blocks = nn.Sequential(
        *(
            nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
            for _ in range(12)
        )
    )
    x = torch.randn(2048, 256)
    model = copy.deepcopy(blocks)
    memtl.apply(model, BackRazorConfig())
    checkpoint_blocks(model, Quantized(8), target_modules=r"\d+")

    def step(model):
        return lambda: model(x).sum().backward()

    with memtl.memory.freed_memory_returned():
        for m in (blocks, model):
            step(m)()
        # The smallest of a few: whatever else the process has begun may grow meanwhile.
        peaks = [[memtl.memory.peak_bytes(step(m)) for _ in range(3)] for m in (blocks, model)]
    if None in peaks[0]:
        pytest.skip("no peak is to be had here")
    peaks = [min(several) for several in peaks]
    assert peaks[0] > 80e6  # 12 blocks of 4 tensors of 2 MiB
    assert peaks[1] < 0.4 * peaks[0]


def test_conversion_and_back():
    model = vit()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    memtl.apply(model, LowBitConfig())
    report = memtl.apply(model, CheckpointConfig())
    assert "blocks.* x3" in str(report)
    assert "input 8-bit" in str(report)
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    assert applied(model) == (LowBitConfig(), CheckpointConfig())
    with pytest.raises(ValueError, match=r"blocks.0 is checkpointed already: memtl.unconvert"):
        memtl.apply(model, CheckpointConfig())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.blocks[1], CheckpointedLayer)
        assert copied.blocks[1].memtl_input == Quantized(8)
    assert memtl.unconvert(model) > 3
    assert [type(m) for m in model.modules()] == classes
    assert not applied(model)
    assert not any(name.startswith("memtl") for m in model.modules() for name in vars(m))


def test_a_block_that_is_converted_itself_goes_back_too():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return x * self.linear(x).sigmoid()

    model = nn.Sequential(Gated(), Gated())
    expected = outcome(model, {"input": torch.randn(4, 8)}, LowBitConfig(bits=8))
    torch.manual_seed(0)
    memtl.apply(model, LowBitConfig(bits=8))
    memtl.apply(model, EXACT)
    assert memtl.unconvert(model) == 4
    assert type(model[0]) is Gated
    assert expected[1].keys() == dict(model.named_parameters()).keys()


def test_json():
    config = CheckpointConfig(bits=4, target_modules=["blocks.0", "blocks.2"])
    assert Config.from_json(config.to_json()) == config


def test_exact_makes_it_exact():
    model, inputs = vit(), images()
    expected = outcome(model, inputs)[1]
    memtl.apply(model, BackRazorConfig())
    memtl.apply(model, CODED)
    with memtl.nn.exact(model):
        gradients = outcome(model, inputs)[1]
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    assert model.blocks[0].memtl_input == Quantized(8)


def test_hooks_run_once_gradients_accumulate_and_grad_works():
    model, inputs = vit(), images()
    memtl.apply(model, EXACT)
    weight = model.blocks[1].mlp.fc1.weight
    seen = []
    weight.register_hook(lambda g: seen.append("gradient"))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    model.blocks[1].register_forward_hook(lambda *_: seen.append("forward"))
    y = model(**inputs)
    (asked,) = torch.autograd.grad(y.sum(), weight, retain_graph=True)
    assert weight.grad is None
    seen.clear()
    y.sum().backward(retain_graph=True)
    assert seen == ["gradient", "accumulated"]
    assert torch.equal(weight.grad, asked)
    y.sum().backward()  # keeps nothing from the one before
    torch.testing.assert_close(weight.grad, 2 * asked)


def test_a_second_derivative_is_refused_inside_a_conversion():
    model, inputs = vit(), images()
    memtl.apply(model, BackRazorConfig())
    memtl.apply(model, CODED)
    weight = model.blocks[1].mlp.fc1.weight
    (g,) = torch.autograd.grad(model(**inputs).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.square().sum().backward()


def test_a_second_derivative_of_stock_layers_is_stocks():
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model, x = nn.Sequential(block, copy.deepcopy(block)), torch.randn(4, 8)

    def second(model):
        weights = list(model.parameters())
        first = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    expected = second(model)
    checkpoint_blocks(model, Dense(), target_modules=["0", "1"])
    torch.testing.assert_close(second(model), expected, rtol=0, atol=0)


def reading(config):
    model = vit()
    memtl.apply(model, config)
    return model


@pytest.mark.parametrize("config", [memtl.VQTConfig(), memtl.Head2ToeConfig()])
def test_blocks_that_are_read_are_not_run_again(config):
    """A second run would not find what the first one was read by."""
    with pytest.raises(ValueError, match="leave CheckpointConfig out"):
        memtl.apply(reading(CODED), config)
    with pytest.raises(ValueError, match="leave CheckpointConfig out"):
        memtl.apply(reading(config), CODED)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        memtl.BitFitConfig(weight_bits=8),
        memtl.AdaptFormerConfig(dropout=0.0),
        memtl.VPTConfig(dropout=0.0),
        "lora",
    ],
)
def test_with_methods_that_train_a_part(config, first, tmp_path):
    """Applied before or after: the same gradients, and what is saved loads."""

    def adapted(*checkpoint):
        torch.manual_seed(1)
        model = vit()
        steps = [*checkpoint, config] if first else [config, *checkpoint]
        for step in steps:
            if step == "lora":
                peft = pytest.importorskip("peft")
                lora = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
                torch.manual_seed(2)
                peft.inject_adapter_in_model(lora, model)
            else:
                torch.manual_seed(2)
                memtl.apply(model, step)
        return model

    model, inputs = adapted(EXACT), images()
    actual, expected = outcome(model, inputs), outcome(adapted(), inputs)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)
    with torch.no_grad():
        for p in model.parameters():
            p += p.requires_grad
    memtl.save(model, tmp_path)
    fresh = vit() if config != "lora" else adapted()
    fresh.load_state_dict(model.state_dict(), strict=False)  # what is frozen
    memtl.load(fresh, tmp_path)
    assert torch.equal(fresh.eval()(**inputs), model.eval()(**inputs))


def test_frozen_parts():
    model, inputs = vit(), images()
    model.requires_grad_(False)
    memtl.apply(model, CODED)
    for parameter in (*model.blocks[1].mlp.parameters(), *model.head.parameters()):
        parameter.requires_grad_(True)
    with memtl.memory.SavedTensors(model) as saved:
        y = model(**inputs)
    assert "blocks.0" not in saved.by_layer  # neither it nor what it is given needs a gradient
    assert saved.by_layer["blocks.1"] == Quantized(8).nbytes(torch.Size((3, 5, 16)), torch.float32)
    y.sum().backward()
    assert model.blocks[1].mlp.fc1.weight.grad.norm() > 0
    assert model.blocks[1].attn.qkv.weight.grad is None


def test_without_gradients_nothing_changes():
    model, inputs = vit().eval(), images()
    expected = model(**inputs)
    memtl.apply(model, CODED)
    with torch.no_grad():
        assert torch.equal(model(**inputs), expected)
    with torch.inference_mode():
        assert torch.equal(model(**inputs), expected)


def test_inside_another_checkpoint():
    model, inputs = vit_with_dropout()
    expected = outcome(model, inputs)[1]
    memtl.apply(model, EXACT)
    whole = model.forward
    model.forward = lambda x: torch.utils.checkpoint.checkpoint(whole, x, use_reentrant=False)
    torch.manual_seed(3)
    y = model(**inputs)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * direction).sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_compiled():
    model, inputs = vit(), images()
    expected = outcome(model, inputs, EXACT)
    memtl.apply(model, EXACT)
    compiled = torch.compile(model, backend="aot_eager")  # the graph breaks at every block
    y = compiled(**inputs)
    torch.testing.assert_close(y, expected[0])
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * direction).sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(actual, expected[1])
    kept = memtl.memory.saved_bytes(compiled, inputs["x"])
    assert 0 < kept <= memtl.memory.saved_bytes(model, inputs["x"])


def test_data_parallel(tmp_path):
    model, inputs = vit(), images()
    expected = outcome(model, inputs, BackRazorConfig(), CODED)
    memtl.apply(model, BackRazorConfig())
    memtl.apply(model, CODED)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        y = nn.parallel.DistributedDataParallel(model)(**inputs)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        (y * direction).sum().backward()
    finally:
        dist.destroy_process_group()
    actual = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(actual, expected[1], rtol=0, atol=0)


def test_which_blocks_are_found():
    stages = nn.Sequential(*(nn.Sequential(Convolutions.Block(), Convolutions.Block()),) * 1)
    report = checkpoint_blocks(nn.ModuleDict({"stages": stages}), Quantized(8))
    assert [row.name for row in report.rows] == ["stages.0.0", "stages.0.1"]
    report = memtl.apply(vit(), CheckpointConfig(target_modules=r"blocks\.[02]"))
    assert [row.name for row in report.rows] == ["blocks.0", "blocks.2"]


def switched_on():
    model = vit()
    model.set_grad_checkpointing()
    return model


@pytest.mark.parametrize(
    ("make", "config", "why"),
    [
        (lambda: nn.Linear(3, 3), CODED, "this Linear has no blocks"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), CODED, "has no blocks"),
        (switched_on, CODED, r"the library's own checkpointing is on \(the model.grad_check"),
        (vit, CheckpointConfig(target_modules="block"), "'block' matches no module"),
        (vit, CheckpointConfig(target_modules=["blocks.9"]), "'blocks.9' is no module"),
        (vit, CheckpointConfig(target_modules=["blocks", "blocks.1"]), "blocks.1 lies within"),
    ],
)
def test_what_it_refuses(make, config, why):
    model = make()
    with pytest.raises(ValueError, match=why):
        memtl.apply(model, config)
    assert not any(isinstance(m, CheckpointedLayer) for m in model.modules())


def test_wrong_options():
    with pytest.raises(ValueError, match="bits must be one of"):
        CheckpointConfig(bits=7)
    with pytest.raises(TypeError, match="target_modules must be None, a string or strings"):
        CheckpointConfig(target_modules=3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        checkpoint_blocks("vit", Quantized(8))


def test_conversion_comes_first():
    model = vit()
    memtl.apply(model, CODED)
    with pytest.raises(ValueError, match=r"already converted \(3 modules\)"):
        memtl.apply(model, BackRazorConfig())


def test_a_cache_is_refused():
    model, inputs = gpt2(use_cache=True)
    memtl.apply(model, CODED)
    with pytest.raises(ValueError, match="train with use_cache=False"):
        model(**inputs)


def test_a_block_that_computes_something_else_the_second_time_is_found_out():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x)[: 4 - self.calls].exp()

    model = nn.Sequential(Changing(), nn.Flatten(0))
    checkpoint_blocks(model, Quantized(8), target_modules=["0"])
    y = model(torch.randn(4, 4))
    with pytest.raises(RuntimeError, match="must depend on its arguments, its parameters"):
        y.sum().backward()


@pytest.mark.parametrize("inside", [None, BackRazorConfig(keep=0.1)], ids=["stock", "fast"])
def test_nothing_of_a_second_run_stays(inside):
    """Attention and softmax save their own outputs, which must not keep themselves."""
    model = vit().train()
    if inside is not None:
        memtl.apply(model, inside)
    memtl.apply(model, CheckpointConfig())
    x = torch.randn(2, 3, 16, 16)

    def tensors_after_a_step():
        model(x).sum().backward()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()  # what it would collect is not freed in time, and cycles through C++ never are
    try:
        tensors_after_a_step()
        first, *more = (tensors_after_a_step() for _ in range(3))
    finally:
        gc.enable()
    assert more == [first] * 2
