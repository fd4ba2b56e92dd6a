"""compress_weights, expand_weights and StandardizedConv2d, on modules and whole models."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.utils.checkpoint import checkpoint

import memtl
from memtl.memory import saved_bytes
from memtl.nn import StandardizedConv2d, compress_weights, convert, expand_weights, unconvert
from memtl.nn.weights import CompressedWeight
from memtl.storage import Dense, Quantized, TopK
from tests.helpers import assert_same

EXACT = {"linear": Dense(), "convolution": Dense()}


class Small(nn.Module):
    """A layer of each kind; the last one trains."""

    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(1, 2, (1, 3, 3), padding=1, padding_mode="circular")
        self.image = nn.Conv2d(2, 4, 3, padding="same", bias=False)
        self.same = Conv2dSame(4, 6, 3, stride=2, groups=2)
        self.line = nn.Conv1d(6, 5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.hidden = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.volume(x.unsqueeze(1))[:, :, 0]
        x = torch.relu(self.same(self.image(x)))
        x = self.norm(self.line(x.flatten(2)))
        return self.head(torch.relu(self.hidden(x.transpose(1, 2))).mean(1))


FROZEN = ("volume", "image", "same", "line", "hidden")


def small() -> Small:
    model = Small().requires_grad_(False).eval()
    model.head.requires_grad_(True)
    return model


def images(**options):
    return torch.randn(2, 1, 8, 8, requires_grad=True, **options)


def pair():
    """A compressed model, and one of parameters with the decoded values."""
    model = small()
    assert compress_weights(model) == len(FROZEN)
    plain = copy.deepcopy(model)
    assert expand_weights(plain) == len(FROZEN)
    return model, plain


def results(model, x):
    out = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *trained])]


def assert_all_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def test_a_compressed_model_is_that_of_the_decoded_weights():
    model, plain = pair()
    x = images()
    assert_all_same(results(model, x), results(plain, x))
    with torch.no_grad():
        assert_same(model(x), plain(x))


def test_what_a_compressed_layer_is():
    stock = small()
    model = copy.deepcopy(stock)
    order = list(stock.state_dict())
    compress_weights(model)
    for name in FROZEN:
        layer, own = model.get_submodule(name), stock.get_submodule(name)
        assert isinstance(layer, type(own)) and type(layer).__name__ == type(own).__name__
        assert "weight" not in dict(layer.named_parameters()) and not layer.weight.requires_grad
        assert layer.weight.dtype == torch.float32 and repr(layer) == repr(own)
        bound = layer.weight_scale.view(-1, *[1] * (own.weight.dim() - 1)) / 2
        assert ((layer.weight - own.weight).abs() <= bound).all()
    assert type(model.head) is nn.Linear
    assert list(model.state_dict()) == order
    model.train()
    assert model.hidden.training
    model.requires_grad_(True)
    assert not model.hidden.weight.requires_grad and model.hidden.bias.requires_grad
    expand_weights(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert not any(p.requires_grad for p in (model.hidden.weight, model.image.weight))
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in stock.named_buffers()]
    assert model.hidden.__dict__.keys() == stock.hidden.__dict__.keys()


def test_bytes_of_weights():
    model = small()
    weights = [model.get_submodule(name).weight for name in FROZEN]
    before = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    compress_weights(model)
    after = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert before - after == sum(3 * w.numel() - 4 * w.shape[0] for w in weights)


def test_nothing_is_kept_of_frozen_weights_for_backward():
    model, plain = pair()
    x = images()
    for name, size in {"image": (2, 2, 8, 8), "same": (2, 4, 8, 8), "line": (2, 6, 16)}.items():
        x = torch.randn(size, requires_grad=True)
        assert saved_bytes(model.get_submodule(name), x) == 0
        assert saved_bytes(plain.get_submodule(name), x) >= x.nbytes  # torch's keeps that
    assert saved_bytes(model.hidden, torch.randn(2, 5, requires_grad=True)) == 0
    # An inner layer whose bias trains.
    model.hidden.bias.requires_grad_(True)
    assert saved_bytes(model.hidden, torch.randn(2, 5)) == 0


def test_devices_dtypes_and_formats():
    model, plain = pair()
    for to in (
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.to(torch.float16),
        lambda m: m.type(torch.float32),
    ):
        to(model)
        layer = model.image
        assert layer.weight_codes.dtype == torch.int8 and layer.weight_scale.dtype == torch.float32
        assert layer.weight.dtype == layer.memtl_weight_dtype == model.head.weight.dtype
    assert_same(model.image.weight, plain.image.weight)
    model.to(torch.bfloat16), plain.to(torch.bfloat16)
    x = images(dtype=torch.bfloat16)
    assert_all_same(results(model, x), results(plain, x))
    model, plain = pair()
    for m in (model, plain):
        m.image.to(memory_format=torch.channels_last), m.same.to(memory_format=torch.channels_last)
    assert not model.image.weight.is_contiguous()
    assert model.image.weight.stride() == plain.image.weight.stride()
    x = images()
    assert_all_same(results(model, x), results(plain, x))
    meta = copy.deepcopy(model).to("meta")
    assert meta.image.weight.is_meta
    empty = meta.to_empty(device="cpu")
    assert empty.load_state_dict(model.state_dict()).missing_keys == []
    assert_same(empty.image.weight, model.image.weight)


def test_autocast():
    model, plain = pair()
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), plain(x)
    assert_same(ours, theirs)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 * theirs.abs().max().item())


def test_copies():
    model, _ = pair()
    x = images()
    expected = results(model, x)
    assert_all_same(results(copy.deepcopy(model), x), expected)
    again = pickle.loads(pickle.dumps(model))
    assert_all_same(results(again, x), expected)
    assert expand_weights(again) == len(FROZEN)


def test_checkpoint_and_compile():
    model, plain = pair()
    x = images()
    expected = results(model, x)
    run = lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    assert_same(torch.autograd.grad(run(x).square().sum(), x)[0], expected[1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = compiled(x)
    torch.testing.assert_close(ours.detach(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), x)[0], expected[1], rtol=1e-4, atol=1e-6
    )


# state_dict


def test_a_state_dict_goes_both_ways():
    model, plain = pair()
    for name, tensor in plain.state_dict().items():
        assert_same(model.state_dict()[name], tensor)
    assert not model.state_dict()["hidden.weight"].requires_grad
    other = small()
    compress_weights(other)
    codes = other.hidden.weight_codes
    assert not other.load_state_dict(model.state_dict()).unexpected_keys
    assert other.hidden.weight_codes is codes
    for name in FROZEN:  # the same codes again
        ours, theirs = other.get_submodule(name), model.get_submodule(name)
        assert_same(ours.weight_codes, theirs.weight_codes)
        assert_same(ours.weight_scale, theirs.weight_scale)
    small().load_state_dict(model.state_dict())
    new = small().state_dict()
    other.load_state_dict(new)
    bound = other.hidden.weight_scale.view(-1, 1) / 2
    assert ((other.hidden.weight - new["hidden.weight"]).abs() <= bound).all()
    assert_same(other.hidden.bias, new["hidden.bias"])
    other.load_state_dict(model.state_dict(), assign=True)
    assert_same(other.hidden.weight, model.hidden.weight)
    assert isinstance(other.hidden, CompressedWeight) and other.hidden.bias.dim() == 1


def test_state_dicts_that_do_not_fit_are_reported_as_by_torch():
    model, plain = pair()
    codes = model.hidden.weight_codes.clone()
    for change in (
        lambda state: state.pop("hidden.weight"),
        lambda state: state.update({"hidden.weight": torch.randn(7, 4)}),
        lambda state: state.update({"hidden.weights": torch.randn(7, 5)}),
        lambda state: state.update({"hidden.weight_codes": torch.zeros(7, 5)}),
    ):
        state = plain.state_dict()
        change(state)
        messages = []
        for module in (model, plain):
            with pytest.raises(RuntimeError) as error:
                module.load_state_dict(state)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert_same(model.hidden.weight_codes, codes)
    state = plain.state_dict()
    del state["hidden.weight"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["hidden.weight"]
    state["hidden.weight"] = torch.full((7, 5), torch.nan)
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="hidden.weight.* not finite"):
            model.load_state_dict(state, assign=assign)
    assert_same(model.hidden.weight_codes, codes)
    assert model.hidden._parameters["weight"] is None


def test_setting_a_weight_encodes_it():
    model, _ = pair()
    w = torch.randn(7, 5)
    model.hidden.weight = w
    assert ((model.hidden.weight - w).abs() <= model.hidden.weight_scale.view(-1, 1) / 2).all()
    model.hidden.weight = nn.Parameter(-w, requires_grad=False)
    assert (model.hidden.weight - w).abs().max() > 1
    with pytest.raises(ValueError, match="cannot train"):
        model.hidden.weight = nn.Parameter(w)
    for other in (None, torch.randn(5, 7)):
        with pytest.raises(ValueError, match=r"tensor \[7, 5\]"):
            model.hidden.weight = other


# which weights


def test_what_is_refused():
    model = small()
    for bits in (4, 16, 8.0, True, None, "8"):
        with pytest.raises(ValueError, match="bits must be 8"):
            compress_weights(model, bits)
    with pytest.raises(TypeError, match="Module"):
        compress_weights(torch.randn(3, 3))
    with pytest.raises(ValueError, match="nothing to compress"):
        compress_weights(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no weight"):
        expand_weights(model)
    compress_weights(model)
    with pytest.raises(ValueError, match="nothing to compress"):
        compress_weights(model)
    for value in (torch.nan, torch.inf):
        model = small()
        model.line.weight[0, 0, 0] = value
        with pytest.raises(ValueError, match="^line.weight holds .*not finite"):
            compress_weights(model)
        assert not any(isinstance(m, CompressedWeight) for m in model.modules())


def test_what_is_left_alone():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 4),
            "tied": nn.Linear(4, 9),
            "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "transposed": nn.ConvTranspose2d(2, 2, 2),
            "plain": nn.Linear(4, 4),
        }
    ).requires_grad_(False)
    model["lazy"] = nn.LazyLinear(3)
    model["lazy"].weight = nn.UninitializedParameter(requires_grad=False)
    with pytest.warns(UserWarning, match="zero-element"):
        model["empty"] = nn.Linear(0, 3).requires_grad_(False)
    model["tied"].weight = model["embedding"].weight
    assert compress_weights(model) == 1
    assert isinstance(model["plain"], CompressedWeight)


def test_a_shared_weight_stays_shared():
    one, two = nn.Linear(6, 6), nn.Linear(6, 6)
    two.weight = one.weight
    model = nn.Sequential(one, nn.Tanh(), two).requires_grad_(False)
    weight = one.weight.detach().clone()
    assert compress_weights(model) == 1
    assert one.weight_codes is two.weight_codes
    copied = copy.deepcopy(model)
    assert copied[0].weight_codes is copied[2].weight_codes
    two.weight = -weight
    assert_same(one.weight, two.weight)
    assert (one.weight + weight).abs().max() <= one.weight_scale.max() / 2
    state = model.state_dict()
    model.load_state_dict({**state, "0.weight": weight, "2.weight": weight})
    assert_same(one.weight, two.weight)
    model.double().float()
    assert one.weight_codes is two.weight_codes
    assert expand_weights(model) == 1
    assert one.weight is two.weight and isinstance(one.weight, nn.Parameter)


def test_a_layer_of_its_own_forward_is_served_too():
    model = nn.Sequential(StdConv2d(3, 4, 3), Conv2dSame(4, 4, 3)).requires_grad_(False)
    plain = copy.deepcopy(model)
    compress_weights(model)
    for layer, own in zip(model, plain, strict=True):
        own.weight.copy_(layer.weight)
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    assert_all_same(results(model, x), results(plain, x))


def test_multi_head_attention_reads_a_decoded_weight():
    model = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    compress_weights(model)
    plain = copy.deepcopy(model)
    expand_weights(plain)
    x = torch.randn(2, 5, 8, requires_grad=True)
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        ours, theirs = (torch.autograd.grad(m(x, x, x)[0].sum(), x)[0] for m in (model, plain))
        assert_same(ours, theirs)
    with torch.no_grad():
        assert_same(model(x, x, x)[0], plain(x, x, x)[0])
    for m in (model, plain):
        convert(m, {"linear": Dense()})
    assert saved_bytes(model, x, x, x) == saved_bytes(plain, x, x, x)


@pytest.mark.parametrize("first", ["compressed", "converted"])
def test_conversion_before_and_after(first):
    stock, x = small(), images()
    formats = {"linear": TopK(0.1), "convolution": Quantized(8), "activation": Quantized(4)}
    model = copy.deepcopy(stock)
    steps = [lambda: compress_weights(model), lambda: convert(model, formats)]
    for step in steps if first == "compressed" else steps[::-1]:
        step()
    plain = copy.deepcopy(stock)
    compress_weights(plain)
    expand_weights(plain)
    convert(plain, formats)
    assert_all_same(results(model, x), results(plain, x))
    assert saved_bytes(model, x) == saved_bytes(plain, x)
    other = copy.deepcopy(model)
    unconvert(model)
    assert sum(isinstance(m, CompressedWeight) for m in model.modules()) == len(FROZEN)
    assert expand_weights(model) == len(FROZEN)
    expand_weights(other)
    assert_all_same(results(other, x), results(plain, x))
    unconvert(other)
    for restored in (model, other):
        assert [type(m) for m in restored.modules()] == [type(m) for m in stock.modules()]


def test_a_network_of_timm():
    model = timm.create_model("mobilenetv2_050", num_classes=3).eval().requires_grad_(False)
    count = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert compress_weights(model) == count
    plain = copy.deepcopy(model)
    expand_weights(plain)
    convert(plain, EXACT)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, plain))
    assert_same(ours, theirs)
    assert saved_bytes(model, x) == saved_bytes(plain, x)


# memtl.save and memtl.load


def total(model):
    plain = copy.deepcopy(model)
    expand_weights(plain)
    return sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("train_bias", [False, True])
def test_decoded_weights_are_not_saved(tmp_path, train_bias):
    def network():
        torch.manual_seed(3)
        return timm.create_model("mobilenetv2_050", num_classes=3)

    def method(model):
        memtl.apply(model, memtl.LinearProbeConfig(num_classes=4))
        compress_weights(model)
        model.conv_head.bias = nn.Parameter(torch.zeros(model.conv_head.out_channels))
        model.conv_head.bias.requires_grad_(train_bias)

    model = network()
    method(model)
    nn.init.normal_(model.classifier.weight)
    nn.init.normal_(model.conv_head.bias)
    if not train_bias:
        model.conv_head.bias.zero_()
    assert memtl.methods.base.transfer.Trained.of(model).total == total(model)
    owned = memtl.methods.base.transfer.owned(model)
    bias = ["conv_head.bias"] if train_bias else []
    buffers = {n for n, _ in model.named_buffers() if n in model.state_dict()}
    assert sorted(owned.keys() - buffers) == ["classifier.bias", "classifier.weight", *bias]
    assert all("weight" not in name for name in buffers)
    memtl.save(model, tmp_path)
    fresh = network()
    method(fresh)
    memtl.load(fresh, tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert_same(fresh.eval()(x), model.eval()(x))


def test_compressed_weights_that_a_method_made_are_saved(tmp_path):
    model = timm.create_model("mobilenetv2_050", num_classes=3)
    memtl.apply(model, memtl.LinearProbeConfig(num_classes=4))
    fresh = copy.deepcopy(model)
    nn.init.normal_(model.classifier.weight)
    for m in (model, fresh):
        m.classifier.weight.requires_grad_(False)
        compress_weights(m.classifier)
    memtl.save(model, tmp_path)
    memtl.load(fresh, tmp_path)
    assert_same(fresh.classifier.weight, model.classifier.weight)
    assert_same(fresh.classifier.weight_codes, model.classifier.weight_codes)


# StandardizedConv2d


def standardised(**options):
    return StandardizedConv2d(4, 6, 3, padding=1, **options)


def reference(layer, x):
    w = layer.weight.flatten(1)
    w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + layer.eps)
    return layer._conv_forward(x, w.view_as(layer.weight), layer.bias)


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"bias": False}, {"padding_mode": "reflect"}, {"stride": 2}, {"eps": 0.1}],
    ids=str,
)
def test_a_standardised_convolution_is_the_papers(options):
    layer = standardised(**options, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    for run in (layer, layer.eval(), lambda x: layer(x[0]).unsqueeze(0)):
        torch.testing.assert_close(run(x)[:1], reference(layer, x)[:1])
    g = torch.randn_like(layer(x))
    ours, theirs = (torch.autograd.grad(y, inputs, g) for y in (layer(x), reference(layer, x)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_bytes_of_a_standardised_convolution():
    layer = standardised()
    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    assert saved_bytes(layer, x) == x.nbytes
    layer.requires_grad_(False)
    assert saved_bytes(layer, x) == 0
    assert compress_weights(layer) == 1
    assert saved_bytes(layer, x) == 0


def test_a_standardised_convolution_converts():
    stock = nn.Sequential(standardised(), nn.ReLU(), standardised().requires_grad_(False))
    stock[2] = StandardizedConv2d(6, 6, 3).requires_grad_(False)
    model = copy.deepcopy(stock)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    report = convert(model, {"convolution": Quantized(4)})
    assert [row.kept for row in report.rows if row.role == "convolution"] == ["4-bit"] * 2
    assert_same(model(x), stock(x))
    torch.testing.assert_close(
        torch.autograd.grad(model(x).sum(), x), torch.autograd.grad(stock(x).sum(), x)
    )
    kept = Quantized(4).nbytes(torch.Size((2, x[0].numel())), x.dtype)
    assert saved_bytes(model[0], x) == kept and saved_bytes(stock[0], x) == x.nbytes
    unconvert(model)
    assert_same(model(x), stock(x))


def test_copies_autocast_compile_and_checkpoint_of_a_standardised_convolution():
    layer = standardised()
    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    expected = results(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_all_same(results(other, x), expected)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out, theirs = layer(x), reference(layer, x)
    torch.testing.assert_close(out, theirs, rtol=0.02, atol=0.05)
    grads = torch.autograd.grad(out.sum(), [x, layer.weight])
    assert all(g.dtype == torch.float32 for g in grads)
    out = checkpoint(layer, x, use_reentrant=False)
    assert_same(torch.autograd.grad(out.square().sum(), x)[0], expected[1])


def test_a_standardised_convolution_refuses_what_has_no_deviation():
    with pytest.raises(ValueError, match="two elements"):
        StandardizedConv2d(4, 4, 1, groups=4)
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="eps"):
            standardised(eps=eps)
    assert "eps=1e-05" in repr(standardised())


@pytest.mark.parametrize("first", ["compressed", "converted", "both"])
def test_lora_of_a_convolution_goes_on_top(first):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).requires_grad_(False)
    if first != "converted":
        compress_weights(model)
    if first != "compressed":
        convert(model, memtl.FrozenConfig().formats())
    expected = model(x := torch.randn(2, 3, 8, 8))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    assert type(model[0].lora_A["default"]) is nn.Conv2d  # a layer of torch's own
    assert_same(model(x).detach(), expected)
    model(x).sum().backward()
    assert model[0].lora_B["default"].weight.grad is not None
