"""What conversion changes, and above all what it does not."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl.memory import saved_bytes
from memtl.nn import convert
from memtl.nn.swap import is_swapped
from memtl.storage import Quantized, TopK

FORMATS = {
    "linear": TopK(0.1),
    "convolution": TopK(0.1),
    "attention": Quantized(4),
    "norm": Quantized(4),
    "activation": Quantized(4),
}


class Attention(nn.Module):
    """Attention as people write it: a function called in forward, through a helper too."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return x + self.mlp(x + self.attn(self.norm(x)))


def block():
    return Block(), torch.randn(3, 9, 32)


def run(model, x, seed=0):
    torch.manual_seed(seed)
    return model(x)


def test_the_forward_is_the_same_bit_for_bit_and_draws_the_same_numbers():
    model, x = block()
    expected = run(model, x)
    state = torch.get_rng_state()
    convert(model, FORMATS)
    assert torch.equal(run(model, x), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_saves_and_unconvert_gives_everything_back():
    model, x = block()
    classes = [type(m) for m in model.modules()]
    before = saved_bytes(model, x)
    report = convert(model, FORMATS)
    assert saved_bytes(model, x) < before / 4
    assert memtl.unconvert(model) == len(report.converted)
    assert [type(m) for m in model.modules()] == classes
    assert saved_bytes(model, x) == before
    assert not any(name.startswith("memtl") for m in model.modules() for name in vars(m))
    with pytest.raises(ValueError, match="nothing in this Block is converted"):
        memtl.unconvert(model)


def test_classes_keys_and_parameters_stay():
    model, _ = block()
    keys = {name: t.data_ptr() for name, t in model.state_dict().items()}
    kinds = {name: type(m) for name, m in model.named_modules()}
    shown = repr(model)
    convert(model, FORMATS)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == keys
    for name, module in model.named_modules():
        assert isinstance(module, kinds[name])
        assert type(module).__name__ == kinds[name].__name__
    assert repr(model) == shown


def test_hooks_fire():
    model, x = block()
    fired = []
    model.attn.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.mlp[0].register_forward_hook(lambda *_: fired.append("forward"))
    model.mlp[0].register_full_backward_hook(lambda *_: fired.append("backward"))
    convert(model, FORMATS)
    model(x).sum().backward()
    assert fired == ["pre", "forward", "backward"]


def test_attention_called_as_a_function_is_caught_without_touching_torch():
    model, x = block()
    stock = Attention()
    functions = dict(vars(F))
    report = convert(model, FORMATS)
    row = next(r for r in report.converted if r.name == "attn")
    assert "scaled_dot_product_attention" in row.kind
    model(x)
    assert dict(vars(F)) == functions
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    assert type(F.scaled_dot_product_attention(q, q, q).grad_fn).__name__.startswith("Scaled")
    assert not is_swapped(stock)


def test_a_mode_in_one_thread_is_unseen_in_another():
    model, x = block()
    convert(model, FORMATS)
    seen = []
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        done.wait(10)

    model.attn.qkv.register_forward_hook(wait)  # while the mode of model.attn is active
    worker = threading.Thread(target=lambda: model(x))
    worker.start()
    assert inside.wait(10)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    seen.append(type(F.scaled_dot_product_attention(q, q, q).grad_fn).__name__)
    done.set()
    worker.join()
    assert seen[0].startswith("Scaled")


def test_copies_pickles_and_whole_model_files():
    model, x = block()
    convert(model, FORMATS)
    expected = run(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(run(twin, x), expected)
        assert type(twin.attn) is type(model.attn)
        memtl.unconvert(twin)
        assert type(twin.attn) is Attention
    assert is_swapped(model.attn)


def test_twice_is_an_error():
    model, _ = block()
    convert(model, FORMATS)
    with pytest.raises(ValueError, match=r"already converted \(\d+ modules\): memtl.unconvert"):
        convert(model, FORMATS)


def test_nothing_to_convert_is_an_error_and_changes_nothing():
    convolution = nn.Conv2d(3, 8, 3).requires_grad_(False)
    convolution.weight.data = convolution.weight.data.to(torch.int8)
    model = nn.Sequential(convolution, nn.LSTM(3, 4))
    with pytest.raises(ValueError, match="nothing to convert in Sequential") as error:
        convert(model, FORMATS)
    assert "computes in torch.int8" in str(error.value)
    assert "memtl has no layer for it" in str(error.value)
    assert not any(map(is_swapped, model.modules()))


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got dict"):
        convert({}, FORMATS)


def test_an_unknown_role():
    with pytest.raises(ValueError, match=r"roles must be among .* got \['lineal'\]"):
        convert(Block(), {"lineal": TopK(0.1)})


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", [r"nope\..*", ["mlp.9"], ["mlp.0", "atn"]])
def test_a_pattern_that_matches_nothing(option, pattern):
    model = Block()
    with pytest.raises(ValueError, match=f"{option}.* matches no module"):
        convert(model, FORMATS, **{option: pattern})
    assert not any(map(is_swapped, model.modules()))


def converted_names(**options):
    return {row.name for row in convert(Block(), FORMATS, **options).converted}


def test_targets_and_exclusions():
    assert converted_names(target_modules=["mlp"]) == {"mlp.0", "mlp.1", "mlp.2", "mlp.3"}
    assert converted_names(target_modules=r"mlp\.\d") == {"mlp.0", "mlp.1", "mlp.2", "mlp.3"}
    assert converted_names(target_modules=["qkv"]) == {"attn.qkv"}
    assert converted_names(exclude_modules=["attn"]) == {
        "norm", "mlp.0", "mlp.1", "mlp.2", "mlp.3",
    }  # fmt: skip
    assert converted_names(target_modules=["mlp"], exclude_modules=["1"]) == {
        "mlp.0", "mlp.2", "mlp.3",
    }  # fmt: skip


def test_a_role_without_a_format_is_left_and_named():
    report = convert(Block(), {**FORMATS, "norm": None})
    row = next(r for r in report.skipped if r.name == "norm")
    assert row.reason == "no format is given for the role norm"
    report = convert(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1)), {"linear": TopK(0.1)})
    assert report.skipped[0].reason == "no format is given for the role convolution"


class Transposed(nn.Linear):
    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight.t())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class Renamed(nn.Linear):
    pass


def test_a_forward_of_its_own_is_served_for_what_it_calls_or_left_alone_with_the_reason():
    model = nn.Sequential(Transposed(8, 8), Doubled(8, 8), Renamed(8, 8))
    x = torch.randn(2, 8)
    expected = model(x)
    report = convert(model, FORMATS)
    assert [(r.name, r.kind) for r in report.converted] == [
        ("1", "Doubled calls linear, mul"),
        ("2", "Renamed"),
    ]
    assert report.skipped[0].reason == "Transposed overrides Linear.forward"
    assert isinstance(model[2], Renamed)
    assert torch.equal(model(x), expected)
    assert saved_bytes(model[1], x) == TopK(0.1).nbytes(x.shape, x.dtype)


def test_in_place_layers_overwrite_and_keep_a_bit():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(inplace=True), nn.Dropout(0.1, inplace=True))
    x = torch.randn(2, 8)
    expected = run(model, x)
    report = convert(model, FORMATS)
    assert [r.kept for r in report.converted[1:]] == ["1 bit, exact"] * 2
    assert torch.equal(run(model, x), expected)
    with memtl.memory.SavedTensors(model) as saved:
        hidden = model[0](x)
        assert model[1](hidden) is hidden
        assert model[2](hidden) is hidden
    assert saved.by_layer["1"] == saved.by_layer["2"] == 128 // 8


def test_the_report_has_a_row_for_every_leaf_and_prints():
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.Linear(8, 8), nn.Softsign(), nn.Linear(8, 4), nn.Identity()
    )
    report = convert(model, FORMATS)
    assert {r.name for r in report.rows} == {"0", "1", "2", "3"}
    text = str(report)
    assert text.startswith("converted 2 modules, left 2")
    assert "* x2" in text and "topk 10% int8" in text
    assert "keeps its integer indices only" in text
    assert "KiB" not in text


class Cube(nn.Module):
    def forward(self, x):
        return x**3


def test_a_measured_report_names_what_unknown_layers_still_keep():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softsign(), nn.Sequential(Cube(), Cube())
    )
    x = torch.randn(2, 3, 8, 8)
    report = convert(model, FORMATS)
    before = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    measured = report.measure(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    kept = {row.name: row.saved for row in measured.rows}
    plane = 2 * 4 * 6 * 6 * 4
    assert kept["0"] == TopK(0.1).nbytes(torch.Size((2, 3 * 8 * 8)), x.dtype)
    assert kept["1"] == Quantized(4).nbytes(torch.Size((2, 4, 6, 6)), x.dtype) + 4 * 4  # and rstd
    assert kept["2"] >= plane and kept["3.0"] == plane
    assert "Softsign" in str(measured) and "KiB kept" in str(measured)
    assert f"{2 * plane / 1024:.1f}" in str(measured)  # both cubes, in one line
    assert sum(kept.values()) == saved_bytes(model, x)


def test_a_report_of_another_model():
    report = convert(nn.Sequential(nn.Linear(2, 2), nn.GELU()), FORMATS)
    with pytest.raises(ValueError, match="the report of another model: no '0' in it"):
        report.measure(nn.Linear(2, 2), torch.randn(1, 2))


def test_a_wrapper_s_prefix_is_not_part_of_a_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    wrapped = torch.compile(model, backend="eager")
    report = convert(wrapped, FORMATS, target_modules=["0"])
    assert [r.name for r in report.converted] == ["0"]
    assert is_swapped(model[0])


def test_a_parametrized_layer():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    x = torch.randn(4, 8)
    expected = model(x)
    convert(model, FORMATS)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_without_gradients_keeps_nothing():
    model, x = block()
    convert(model, FORMATS)
    model.eval()
    with torch.no_grad():
        assert saved_bytes(model, x) == 0


def test_freezing_after_the_conversion_counts():
    model, x = block()
    convert(model, FORMATS)
    trained = saved_bytes(model, x)
    model.requires_grad_(False)
    assert saved_bytes(model, x) == 0
    model.mlp[3].bias.requires_grad_(True)
    assert saved_bytes(model, x) < trained / 10


def test_gradient_checkpointing_over_a_converted_block():
    model, x = block()
    convert(model, FORMATS)

    def gradients(forward):
        model.zero_grad()
        torch.manual_seed(3)
        forward().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(lambda: model(x))
    checkpointed = gradients(
        lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    )
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_compiled_as_one_graph():
    model, x = block()
    model.eval()  # compiled dropout draws otherwise
    convert(model, FORMATS)

    def gradients(f):
        model.zero_grad()
        out = f(x)
        out.square().sum().backward()
        return out, [p.grad.clone() for p in model.parameters()]

    out, expected = gradients(model)
    compiled_out, found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert torch.equal(out, compiled_out)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multihead_attention(batch_first, need_weights, masked):
    layer = nn.MultiheadAttention(32, 4, dropout=0.1, add_bias_kv=True, batch_first=batch_first)
    x = torch.randn(6, 6, 32)
    options = {"need_weights": need_weights}
    if masked:
        options["attn_mask"] = torch.randn(6, 6)
        options["key_padding_mask"] = torch.rand(6, 6) < 0.2
    torch.manual_seed(1)
    expected = layer(x, x, x, **options)
    stock = saved_bytes(lambda: layer(x, x, x, **options))
    convert(nn.ModuleList([layer]), FORMATS)
    torch.manual_seed(1)
    found = layer(x, x, x, **options)
    assert torch.equal(found[0], expected[0])
    if need_weights:
        assert torch.equal(found[1], expected[1])
    found[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert saved_bytes(lambda: layer(x, x, x, **options)) < stock


def test_a_torch_encoder_layer_compiles_too():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 32)
    convert(layer, FORMATS)
    expected = layer(x)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert layer.linear1.weight.grad is not None
