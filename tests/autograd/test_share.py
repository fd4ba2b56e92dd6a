"""Kept once: what is rebuilt from what, what that leaves to keep, and when it must not be."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memtl
from memtl import functional as M
from memtl.autograd import share
from memtl.memory import saved_bytes
from memtl.storage import Dense, Quantized, TopK, pack
from tests.helpers import cosine, grad_like

B, N, C = 3, 7, 128
ONCE = Quantized(4, rebuild=True)
TOKENS, IMAGES = (B, N, C), (B, 64, 6, 6)


def q(*shape: int, bits: int = 4) -> int:
    """Bytes of so many elements in groups of 64."""
    return math.ceil(math.prod(shape) / 64) * (8 * bits + 4)


def mask_bytes(*shape: int) -> int:
    return math.ceil(math.prod(shape) / 8)


class RMSNorm(nn.RMSNorm):
    """With a weight that is not all ones."""


class Split(nn.Module):
    """q, k and v by layers of their own from one tensor, then attention and its projection."""

    def __init__(self, width: int, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self.qkv())
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def qkv(self):
        return self.q, self.k, self.v


class Gated(nn.Module):
    """silu(gate) * up, then a linear layer: the MLP of Llama."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(3))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


@dataclasses.dataclass(frozen=True)
class Chain:
    """Layers, the shape of their input, and the bytes they keep, parameters apart."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kept: int


def _seq(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def linear():
    return nn.Linear(C, C)


def conv(stride: int = 1, kernel: int = 3):
    return lambda: nn.Conv2d(64, 64, kernel, stride, padding=kernel // 2)


def batch_norm():
    return nn.BatchNorm2d(64)


TOKEN_STATE, IMAGE_STATE = q(*TOKENS), q(*IMAGES)
CHAINS = {
    "LayerNorm, Linear": Chain(
        _seq(lambda: nn.LayerNorm(C), linear), TOKENS, TOKEN_STATE + 4 * B * N
    ),
    "RMSNorm, Linear": Chain(_seq(lambda: RMSNorm(C), linear), TOKENS, TOKEN_STATE + 4 * B * N),
    "Linear, GELU, Linear": Chain(_seq(linear, nn.GELU, linear), TOKENS, 2 * TOKEN_STATE),
    "Linear, SiLU, Linear": Chain(_seq(linear, nn.SiLU, linear), TOKENS, 2 * TOKEN_STATE),
    "LayerNorm, GELU, Linear": Chain(
        _seq(lambda: nn.LayerNorm(C), nn.GELU, linear), TOKENS, TOKEN_STATE + 4 * B * N
    ),
    "LayerNorm, Flatten, Linear": Chain(
        _seq(lambda: nn.LayerNorm(C), nn.Flatten, lambda: nn.Linear(N * C, 5)),
        TOKENS,
        TOKEN_STATE + 4 * B * N,
    ),
    "LayerNorm, GELU, Dropout, Linear": Chain(
        _seq(lambda: nn.LayerNorm(C), nn.GELU, lambda: nn.Dropout(0.3), linear),
        TOKENS,
        TOKEN_STATE + 4 * B * N + mask_bytes(*TOKENS),
    ),
    "LayerNorm, attention": Chain(
        _seq(lambda: nn.LayerNorm(C), lambda: Split(C)), TOKENS, 4 * TOKEN_STATE + 4 * B * N
    ),
    "gated": Chain(lambda: Gated(C), TOKENS, 3 * TOKEN_STATE),
    "BatchNorm, Conv": Chain(_seq(batch_norm, conv()), IMAGES, IMAGE_STATE + 4 * 64),
    "BatchNorm, ReLU, Conv": Chain(
        _seq(batch_norm, nn.ReLU, conv()), IMAGES, IMAGE_STATE + 4 * 64 + mask_bytes(*IMAGES)
    ),
    "BatchNorm, ReLU in place, Conv": Chain(
        _seq(batch_norm, lambda: nn.ReLU(inplace=True), conv()),
        IMAGES,
        IMAGE_STATE + 4 * 64 + mask_bytes(*IMAGES),
    ),
    "BatchNorm, ReLU6, strided Conv": Chain(
        _seq(batch_norm, nn.ReLU6, conv(2, 1)),
        IMAGES,
        IMAGE_STATE + 4 * 64 + mask_bytes(*IMAGES),
    ),
    "BatchNorm, LeakyReLU, Conv": Chain(
        _seq(batch_norm, lambda: nn.LeakyReLU(0.1), conv()),
        IMAGES,
        IMAGE_STATE + 4 * 64 + mask_bytes(*IMAGES),
    ),
    "BatchNorm, SiLU in place, Conv": Chain(
        _seq(batch_norm, lambda: nn.SiLU(inplace=True), conv()), IMAGES, IMAGE_STATE + 4 * 64
    ),
    "BatchNorm, Hardswish, Conv": Chain(
        _seq(batch_norm, nn.Hardswish, conv()), IMAGES, IMAGE_STATE + 4 * 64
    ),
    "GroupNorm, SiLU, Conv": Chain(
        _seq(lambda: nn.GroupNorm(4, 64), nn.SiLU, conv()), IMAGES, IMAGE_STATE + 4 * B * 4
    ),
    "Conv, BatchNorm, ReLU, Conv": Chain(
        _seq(conv(), batch_norm, nn.ReLU, conv()),
        IMAGES,
        2 * IMAGE_STATE + 4 * 64 + mask_bytes(*IMAGES),
    ),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def build(chain: Chain) -> nn.Module:
    """The layers, converted; affine parameters are random."""
    model = chain.build().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


@every_chain
def test_bytes(chain):
    model = build(chain)
    x = torch.randn(chain.shape, requires_grad=True)
    stock = saved_bytes(lambda: model(x.clone()))
    memtl.apply(model, memtl.LowBitConfig())
    assert saved_bytes(lambda: model(x.clone())) == chain.kept < stock  # a leaf is never shared


@every_chain
def test_forward_is_stock(chain):
    model = build(chain)
    x = torch.randn(chain.shape, requires_grad=True)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    expected = model(x)
    model.load_state_dict(state)
    memtl.apply(model, memtl.LowBitConfig())
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


EXACT_MASK = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Dropout, nn.Flatten)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d, nn.GroupNorm)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", [n for n in CHAINS if "attention" not in n and n != "gated"])
def test_gradients_are_those_of_the_rebuilt_tensors(name, bits):
    """Layer by layer, from the end: stock layers on what stands for their input."""
    chain = CHAINS[name]
    model = build(chain)
    stock = copy.deepcopy(model)
    memtl.apply(model, memtl.LowBitConfig(bits))
    x = torch.randn(chain.shape, requires_grad=True)
    torch.manual_seed(1)
    inputs, stand_ins = [x], []
    for layer in model:
        before, found = inputs[-1].detach().clone(), share.shared(inputs[-1])
        stand_ins.append((before, None if found is None else found.unpack().detach()))
        inputs.append(layer(inputs[-1]))
    out = inputs[-1]
    grad = grad_like(out)
    out.backward(grad)

    format = Quantized(bits)
    for layer, converted, (exact, approximate) in zip(
        reversed(stock), reversed(model), reversed(stand_ins), strict=True
    ):
        if isinstance(layer, (*EXACT_MASK, *NORMS)):
            value = exact  # the norm keeps its own x-hat: memtl's layer alone
        elif approximate is not None:
            value = approximate
        else:
            value = pack(exact, format).unpack()
        value.requires_grad_()
        if isinstance(layer, NORMS):
            memtl.apply(layer, memtl.LowBitConfig(bits))
        torch.manual_seed(1)  # of the one dropout
        result = layer(value.clone() if getattr(layer, "inplace", False) else value)
        result.backward(grad)
        # float32 rounding of sums in another order, of terms that may cancel (a bias in front of a
        # batch norm); a code off by one would be a thousandth.
        bound = 1e-5 * grad.norm()
        grad = value.grad
        for p, expected in zip(converted.parameters(), layer.parameters(), strict=True):
            assert (p.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm() + bound
    assert (x.grad - grad).norm() <= 1e-5 * grad.norm()


@pytest.mark.parametrize("name", ["LayerNorm, attention", "gated"])
def test_gradients_are_close_to_the_exact_ones(name):
    chain = CHAINS[name]
    model = build(chain)
    x = torch.randn(chain.shape)
    out = model(x)
    out.backward(grad_like(out))
    exact = {n: p.grad.clone() for n, p in model.named_parameters()}
    memtl.apply(model, memtl.LowBitConfig(8))
    model.zero_grad()
    model(x).backward(grad_like(out))
    largest = max(g.norm() for g in exact.values())
    for n, p in model.named_parameters():
        if exact[n].norm() > 1e-5 * largest:  # the bias of k has none
            assert cosine(p.grad, exact[n]) > 0.999, n


def test_attention_is_rebuilt_from_its_operands():
    operands = [torch.randn(2, 3, 10, 64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(5, 64, requires_grad=True)
    out = M.scaled_dot_product_attention(*operands, is_causal=True, scale=0.2, format=ONCE)
    M.linear(out, weight, format=ONCE).sum().backward()
    stored = [pack(t.detach(), ONCE).unpack() for t in operands]
    rebuilt = F.scaled_dot_product_attention(*stored, is_causal=True, scale=0.2)
    expected = rebuilt.reshape(-1, 64).sum(0).expand(5, 64)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-4)


def test_attention_with_dropout_is_not_rebuilt():
    q_, k, v = (torch.randn(2, 3, 10, 64, requires_grad=True) for _ in range(3))
    out = M.scaled_dot_product_attention(q_, k, v, dropout_p=0.5, format=ONCE)
    assert share.shared(out) is None


def test_a_softmax_is_kept_once():
    x = torch.randn(4, 64, 64, requires_grad=True)
    v = torch.randn(4, 64, 64, requires_grad=True)
    kept = saved_bytes(lambda: M.matmul(M.softmax(x, -1, format=ONCE), v, format=ONCE))
    assert kept == 2 * q(4, 64, 64)
    M.matmul(M.softmax(x, -1, format=ONCE), v, format=ONCE).sum().backward()
    root = pack(x.detach().softmax(-1).sqrt(), ONCE).unpack()
    expected = root.square().transpose(1, 2) @ torch.ones(4, 64, 64)
    torch.testing.assert_close(v.grad, expected)


# ------------------------------------------------------------------------- what ends a rebuild


def norm_then(change: Callable[[Tensor], Tensor], format=ONCE):
    """(bytes, gradient of the weight, the input of the linear layer) of a norm, a change, a linear
    layer."""
    x = torch.randn(B, N, C, requires_grad=True)
    weight = nn.Parameter(torch.randn(5, C))
    seen = []

    def run():
        y = change(M.layer_norm(x, (C,), format=format))
        seen[:] = [y.detach().clone()]
        return F.linear(y, weight) if format is None else M.linear(y, weight, format=format)

    with memtl.memory.SavedTensors() as saved:
        out = run()
    out.backward(grad_like(out))
    return saved.bytes - weight.nbytes, weight.grad, seen[0]


def weight_grad_of(y: Tensor) -> Tensor:
    return grad_like(torch.empty(*y.shape[:-1], 5)).reshape(-1, 5).T @ y.reshape(-1, C)


ALONE = TOKEN_STATE + 4 * B * N


def test_a_change_in_place_ends_it():
    kept, grad, y = norm_then(lambda y: y.mul_(3).add_(1))
    assert kept == ALONE + TOKEN_STATE
    torch.testing.assert_close(grad, weight_grad_of(pack(y, ONCE).unpack()))


def test_a_change_in_place_of_a_view_ends_it():
    def change(y):
        y[:, 0] = 5.0
        return y

    kept, grad, y = norm_then(change)
    assert kept == ALONE + TOKEN_STATE
    torch.testing.assert_close(grad, weight_grad_of(pack(y, ONCE).unpack()))


def test_an_unknown_operation_ends_it():
    kept, grad, y = norm_then(lambda y: y + 1)
    assert kept == ALONE + TOKEN_STATE
    torch.testing.assert_close(grad, weight_grad_of(pack(y, ONCE).unpack()))


def test_another_precision_ends_it():
    x = torch.randn(B, N, C, requires_grad=True)
    weight = torch.randn(5, C, dtype=torch.bfloat16, requires_grad=True)
    y = M.layer_norm(x, (C,), format=ONCE).bfloat16()
    M.linear(y, weight, format=ONCE).sum().backward()
    stored = pack(y.detach(), ONCE).unpack()
    expected = stored.reshape(-1, C).sum(0).expand(5, C)
    torch.testing.assert_close(weight.grad, expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y[:, 2:5],
        lambda y: y.transpose(0, 1),
        lambda y: y[1:, ::2].transpose(0, 1),
        lambda y: y.view(B * N, C)[3:],
        lambda y: y.expand(B, N, C),
    ],
    ids=["part", "transposed", "part transposed", "rows", "itself"],
)
def test_a_view_is_rebuilt(view):
    torch.manual_seed(0)
    kept, grad, y = norm_then(view)
    assert kept == ALONE
    torch.manual_seed(0)
    x = torch.randn(B, N, C)
    x_hat = pack(F.layer_norm(x, (C,)), ONCE).unpack()
    torch.testing.assert_close(grad, weight_grad_of(view(x_hat)), rtol=1e-4, atol=1e-4)


def test_a_view_of_a_result_in_channels_last():
    x = torch.randn(IMAGES).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(5, 6, requires_grad=True)
    y = M.batch_norm(x, None, None, training=True, format=ONCE)
    part = y.permute(0, 2, 1, 3)[:, 1:]
    M.linear(part, weight, format=ONCE).sum().backward()
    found = share.shared(part)
    assert found is not None and cosine(found.unpack(), part.detach()) > 0.98
    expected = found.unpack().reshape(-1, 6).sum(0).expand(5, 6)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "act", [M.relu, M.relu6, M.hardsigmoid, M.dropout], ids=lambda f: f.__name__
)
def test_a_mask_is_exact_in_every_layout(act, inplace, layout):
    x = torch.randn(IMAGES)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(1, 3).contiguous().transpose(1, 3)
    y = M.batch_norm(x.requires_grad_(), None, None, training=True, format=ONCE)
    before = share.shared(y).unpack()
    out = act(y, inplace=inplace)
    found = share.shared(out).unpack()
    assert cosine(found, out.detach()) > 0.95
    if act in (M.relu, M.dropout):
        factor = 2.0 if act is M.dropout else 1.0
        assert torch.equal(found, torch.where(out != 0, before * factor, 0.0))
    part = out[:, 1:, 2:]
    assert torch.equal(share.shared(part).unpack(), found[:, 1:, 2:])


def test_a_producer_without_gradients_offers_nothing():
    x, weight = torch.randn(B, N, C), torch.randn(5, C, requires_grad=True)
    with torch.no_grad():
        y = M.layer_norm(x, (C,), format=ONCE)
    assert share.shared(y) is None
    frozen = M.layer_norm(x, (C,), torch.ones(C), torch.zeros(C, requires_grad=True), format=ONCE)
    assert share.shared(frozen) is None  # the bias trains: x-hat is not kept
    M.linear(frozen, weight, format=ONCE).sum().backward()
    expected = pack(frozen.detach(), ONCE).unpack().reshape(-1, C).sum(0).expand(5, C)
    torch.testing.assert_close(weight.grad, expected)


def test_a_module_used_twice():
    """Two uses, two states; the layer after them takes the right one."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(C), "fc": nn.Linear(C, C)})
    stock = copy.deepcopy(model)

    def run(m, x):
        return m["fc"](m["norm"](m["fc"](m["norm"](x))))

    x = torch.randn(TOKENS)
    out = run(stock, x)
    out.backward(grad_like(out))
    memtl.apply(model, memtl.LowBitConfig(8))
    run(model, x).backward(grad_like(out))
    for (name, p), exact in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert cosine(p.grad, exact.grad) > 0.999, name


def test_only_what_is_kept_as_finely_is_taken():
    x = torch.randn(B, N, C, requires_grad=True)
    y = M.layer_norm(x, (C,), format=Quantized(3, rebuild=True))
    assert share.shared(y, Quantized(3, rebuild=True)) is not None
    assert share.shared(y, Quantized(2, rebuild=True)) is not None
    assert share.shared(y, TopK(0.1, rebuild=True)) is not None
    assert share.shared(y, Quantized(4, rebuild=True)) is None
    assert share.shared(y, Dense(rebuild=True)) is None
    assert share.shared(y, Quantized(3)) is None  # not asked for
    assert share.shared(M.layer_norm(x, (C,), format=Quantized(4)), ONCE) is None  # not offered


def test_bits_by_role():
    chain = CHAINS["LayerNorm, Linear"]
    x = torch.randn(TOKENS, requires_grad=True)
    model = build(chain)
    memtl.apply(model, memtl.LowBitConfig(4, norm=2, linear=8))
    assert saved_bytes(lambda: model(x)) == q(*TOKENS, bits=2) + q(*TOKENS, bits=8) + 4 * B * N


@pytest.mark.parametrize("format", [TopK(0.1), Quantized(4), TopK(0.1, rebuild=True)], ids=str)
def test_one_tensor_of_several_layers_is_kept_once_in_any_format(format):
    x = torch.randn(TOKENS, requires_grad=True).clone()
    weights = [nn.Parameter(torch.randn(5, C)) for _ in range(3)]
    kept = saved_bytes(lambda: sum(M.linear(x, w, format=format).sum() for w in weights))
    assert kept == format.nbytes(x.shape, x.dtype) + 3 * weights[0].nbytes
    image, kernels = torch.randn(IMAGES, requires_grad=True).clone(), torch.randn(2, 8, 64, 3, 3)
    kernels = [k.requires_grad_() for k in kernels.unbind()]
    outs = [M.conv2d(image, k, format=format) for k in kernels]
    sum(out.sum() for out in outs).backward()
    rows = pack(image.detach().flatten(1), format).unpack().view(IMAGES)
    leaf = kernels[0].detach().clone().requires_grad_()
    F.conv2d(rows, leaf).sum().backward()
    torch.testing.assert_close(kernels[1].grad, leaf.grad, rtol=1e-4, atol=1e-4)


def test_nothing_of_it_is_seen(tmp_path):
    """No attribute, nothing in a pickle, and no tensor is kept alive."""
    gc.collect()
    before = len(share._offers)
    x = torch.randn(B, N, C, requires_grad=True)
    y = M.layer_norm(x, (C,), format=ONCE)
    assert not y.__dict__
    torch.save(y.detach(), tmp_path / "y.pt")
    out = M.linear(y, torch.randn(5, C, requires_grad=True), format=ONCE)
    gate = nn.Parameter(torch.randn(C))
    product = M.mul(y, gate, format=ONCE)
    assert len(share._offers) > before
    (out.sum() + product.sum()).backward()
    del x, y, out, gate, product
    gc.collect()
    assert len(share._offers) == before


# ------------------------------------------------------- what may change without being counted


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_leaf_is_never_shared(rebuild):
    """It outlives a step, and changes unseen: by `.data`, a fused optimizer, from numpy."""
    format = Quantized(8, rebuild=rebuild)
    array = torch.randn(32, 64).numpy()
    x = torch.from_numpy(array)
    weight = nn.Parameter(torch.randn(8, 64))
    for _ in range(3):
        array[:] = torch.randn(32, 64).numpy()
        for y in (x, x.view(4, 8, 64)):
            weight.grad = None
            M.linear(y, weight, format=format).sum().backward()
            expected = x.sum(0).expand(8, 64)
            assert (weight.grad - expected).norm() < 0.02 * expected.norm()
    assert share.shared(x) is None


def test_a_learned_query_under_a_fused_optimizer():
    query, weight = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(8, 64))
    optimizer = torch.optim.AdamW([query], lr=0.5, fused=True)
    for _ in range(4):
        query.grad = weight.grad = None
        out = M.linear(query, weight, format=Quantized(8, rebuild=True))
        out.square().sum().backward()
        expected = 2 * out.detach().T @ query.detach()
        assert (weight.grad - expected).norm() < 0.02 * expected.norm()
        optimizer.step()


def test_a_parameter_changed_between_producer_and_consumer_ends_it():
    """Truncated backpropagation: a state is detached in place, after a step, and read again."""
    x, scale = torch.randn(8, 64, requires_grad=True), nn.Parameter(torch.rand(64) + 0.5)
    weight = nn.Parameter(torch.randn(5, 64))
    format = Quantized(8, rebuild=True)
    for make in (
        lambda: M.layer_norm(x, (64,), scale, format=format),
        lambda: M.mul(x * 1, scale, format=format),
    ):
        state = make()
        state.sum().backward()
        with torch.no_grad():
            scale.mul_(3)
        assert share.offered(state) is None
        state.detach_()
        weight.grad = None
        M.linear(state, weight, format=format).sum().backward()
        expected = state.sum(0).expand(5, 64)
        assert (weight.grad - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("offset", [0, 8])
def test_a_base_that_starts_inside_its_storage(offset):
    source = torch.randn(40, 64, requires_grad=True)
    base = torch.ops.aten.unsafe_split.Tensor(source * 1, 20)[1] if offset else source * 1
    first, weight = nn.Parameter(torch.randn(3, 64)), nn.Parameter(torch.randn(8, 64))
    M.linear(base, first, format=Quantized(8, rebuild=True))
    part = base[4:12]
    M.linear(part, weight, format=Quantized(8, rebuild=True)).sum().backward()
    expected = part.detach().sum(0).expand(8, 64)
    assert (weight.grad - expected).norm() < 0.02 * expected.norm()


def test_nothing_dropped_or_clamped_stands_for_more():
    x = 10 * torch.randn(32, 64, requires_grad=True)
    fine = Quantized(8, rebuild=True)
    M.linear(x, nn.Parameter(torch.randn(3, 64)), format=TopK(0.01))
    assert share.shared(x, TopK(1.0, values="fp32", rebuild=True)) is None
    x = x * 1
    M.linear(x, nn.Parameter(torch.randn(3, 64)), format=Quantized(8, (-1.0, 1.0)))
    assert share.shared(x, fine) is None
    # A state on the very range of a derivative is no derivative.
    x = torch.rand(32, 64, requires_grad=True) * 1
    code = Quantized(8, (0.0, 1.0))
    M.linear(x, nn.Parameter(torch.randn(3, 64)), format=code)
    (grad,) = torch.autograd.grad(M.tanh(x, format=code).sum(), x)
    assert (grad - (1 - x.tanh().square())).abs().max() < 0.02


def test_no_offer_outlives_its_tensor():
    gc.collect()  # slow, late in a long run: once for all formats
    before = len(share._offers)
    kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
    for layout in (torch.contiguous_format, torch.channels_last):
        for format in (Dense(), Dense("fp32"), TopK(0.1), ONCE):
            x = torch.randn(2, 3, 8, 8, requires_grad=True).to(memory_format=layout) * 1
            M.conv2d(x, kernel, padding=1, format=format).sum().backward()
    del x
    gc.collect()
    assert len(share._offers) == before


def test_inference_tensors_under_autocast():
    with torch.inference_mode():
        features = torch.randn(4, 64)
    weight = nn.Parameter(torch.randn(8, 64))
    bias = nn.Parameter(torch.zeros(8))
    with torch.autocast("cpu", torch.bfloat16):
        M.linear(features, weight.detach(), bias, format=ONCE).float().sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 4.0))


def test_small_numbers_under_float16_autocast_keep_their_float32():
    x = 1e-9 * torch.randn(64, 64, requires_grad=True)
    b = torch.randn(64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        M.linear(x, nn.Parameter(torch.randn(8, 64)), format=ONCE)
    M.mul(x, b, format=Quantized(8, rebuild=True)).sum().backward()
    assert (b.grad - x).norm() < 0.02 * x.norm()


# ------------------------------------------------------------------------------ surroundings


class Gate(nn.Module):
    """One reader has packed x when the next one comes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x))


class Short(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.conv = nn.Conv2d(64, 64, 1, 2), nn.Conv2d(64, 64, 3, 2, 1)

    def forward(self, x):
        return self.down(x) + self.conv(x)


@pytest.mark.parametrize(
    "config",
    [
        memtl.BackRazorConfig(),
        memtl.BackRazorConfig.preset("small"),
        memtl.LowBitConfig(),
        memtl.LowBitConfig(4, activation=8),
    ],
    ids=["fast", "small", "4 bits", "4 and 8 bits"],
)
@pytest.mark.parametrize("kind", [Gate, Short])
def test_a_checkpointed_region_repeats_itself(kind, config):
    model = kind()
    memtl.apply(model, config)
    x = torch.randn((8, 64) if kind is Gate else IMAGES, requires_grad=True) * 1
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_checkpointed_region_leaves_nothing_behind():
    gc.collect()
    before = len(share._offers)
    blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C)) for _ in range(3)))
    memtl.apply(blocks, memtl.LowBitConfig())
    x = torch.randn(TOKENS, requires_grad=True)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    assert len(share._offers) == before
    x.sum().backward()
    assert len(share._offers) == before


@every_chain
def test_autocast_keeps_it(chain):
    """Norms give float32, products take bfloat16: the cast is no reason to keep it twice."""
    model = build(chain)
    memtl.apply(model, memtl.LowBitConfig())
    x = torch.randn(chain.shape, requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x.clone())

    assert saved_bytes(run) <= chain.kept
    run().float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_chain
def test_checkpointing_and_accumulation(chain):
    """A checkpointed region shares nothing: what is rounded apart agrees within its rounding."""
    model = build(chain)
    memtl.apply(model, memtl.LowBitConfig(8))
    x = torch.randn(chain.shape, requires_grad=True)

    def gradients(run):
        for p in model.parameters():
            p.grad = None
        for _ in range(2):
            torch.manual_seed(3)
            out = run(x)
            out.backward(grad_like(out))
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(model)
    again = gradients(lambda x: checkpoint(model, x, use_reentrant=False))
    largest = max(a.norm() for a in plain)
    for a, b in zip(plain, again, strict=True):
        assert (a - b).norm() < 0.02 * a.norm() + 1e-4 * largest


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_between_producer_and_consumer(reentrant):
    """A region takes in its recomputation what it took before: nothing of another one."""
    model = build(CHAINS["LayerNorm, GELU, Linear"])
    memtl.apply(model, memtl.LowBitConfig())

    def gradients(run):
        x = torch.randn(TOKENS, generator=torch.Generator().manual_seed(5)).requires_grad_()
        for layer in model:
            layer.zero_grad()
            x = run(layer, x)
        x.backward(grad_like(x))
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(lambda layer, x: layer(x))
    again = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    for a, b in zip(plain, again, strict=True):
        assert cosine(a, b) > 0.98


@pytest.mark.parametrize("name", ["LayerNorm, GELU, Linear", "BatchNorm, ReLU in place, Conv"])
def test_compiled(name):
    """Nothing is shared there; what is computed is right."""
    chain = CHAINS[name]
    model = build(chain)
    memtl.apply(model, memtl.LowBitConfig())
    stock = copy.deepcopy(model)
    memtl.unconvert(stock)
    x = torch.randn(chain.shape)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), stock(x)
    assert torch.equal(out, expected)
    out.backward(grad_like(out))
    expected.backward(grad_like(out))
    for p, exact in zip(model.parameters(), stock.parameters(), strict=True):
        assert cosine(p.grad, exact.grad) > 0.97


def test_a_second_derivative_is_refused():
    x = torch.randn(B, N, C, requires_grad=True)
    y = M.linear(M.layer_norm(x, (C,), format=ONCE), torch.randn(5, C), format=ONCE)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_a_weight_changed_before_backward_is_an_error():
    x = torch.randn(B, N, C)
    scale = nn.Parameter(torch.ones(C))
    weight = torch.randn(5, C, requires_grad=True)
    out = M.linear(M.layer_norm(x, (C,), scale, format=ONCE), weight, format=ONCE)
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
