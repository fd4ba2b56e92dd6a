"""Under an exact format gradients are stock's, bit for bit, and what is kept is kept by reference.

Every function over the table in cases.py; then the bytes of each kind of layer, by formula, and
what is rebuilt from what.
"""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memtl
from memtl import functional as M
from memtl.autograd import share
from memtl.memory import saved_bytes
from memtl.nn import ROLES, convert
from memtl.storage import Dense
from tests.autograd.cases import CASES
from tests.helpers import assert_same, grad_like, leaves

EXACT = Dense(rebuild=True)
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
LAID_OTHERWISE = ("scaled_dot_product_attention", "einsum")  # of operands that are not contiguous
NO_16_BITS = ("avg_pool3d",)  # torch has none
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def step(fn, tensors, needs=None, autocast=False):
    """(y, gradients) of ``fn`` on fresh leaves; the layout of tensors is kept."""
    inputs = [
        t.detach().as_strided(t.shape, t.stride()).requires_grad_(need)
        for t, need in zip(tensors, needs or [True] * len(tensors), strict=True)
    ]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = fn(*inputs)
    needing = [t for t in inputs if t.requires_grad]
    # Not backward(), which lays the gradient of a leaf out like the leaf.
    grads = iter(torch.autograd.grad(out, needing, grad_like(out)))
    return out.detach(), [next(grads) if t.requires_grad else None for t in inputs]


def check(case, tensors, needs=None, autocast=False):
    expected, stock = step(case.stock, tensors, needs, autocast)
    for format in (EXACT, Dense()):
        out, ours = step(lambda *t: case.ours(format, *t), tensors, needs, autocast)  # noqa: B023
        assert_same(out, expected)
        for a, b in zip(ours, stock, strict=True):
            if b is None:
                assert a is None
            else:
                assert_same(a, b)
                assert a.stride() == b.stride() or case.function in LAID_OTHERWISE


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_stock_bit_for_bit(case, dtype):
    if case.function in NO_16_BITS and dtype.itemsize == 2:
        pytest.skip("torch has none")
    if dtype == torch.float64 and case.function == "rms_norm":
        pytest.skip("transformers' computes in float32")
    check(case, case.tensors(dtype))


@EVERY
def test_gradients_are_stock_bit_for_bit_under_autocast(case):
    check(case, case.tensors(), autocast=True)


@EVERY
def test_each_gradient_alone_is_stock_bit_for_bit(case):
    tensors = case.tensors()
    for i in range(len(tensors)):
        check(case, tensors, [j == i for j in range(len(tensors))])


def _last(t):
    """Channels last in memory, of any number of dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t


def _every_second(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def _transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@EVERY
@pytest.mark.parametrize("layout", [_last, _every_second, _transposed])
def test_gradients_are_stock_bit_for_bit_in_every_layout(case, layout):
    if case is CASES["linear-transposed"]:
        pytest.skip("Conv1D takes views of contiguous tensors")
    tensors = case.tensors()
    check(case, [layout(tensors[0]), *tensors[1:]])


LAID = {
    "contiguous": lambda t: t,
    "channels last": _last,
    "transposed": _transposed,
    "part": lambda t: torch.cat((t, t), 1).to(memory_format=torch.channels_last)[:, : t.shape[1]],
    "odd": lambda t: t.contiguous().as_strided(
        t.shape, [3 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    ),
    "expanded": lambda t: t[:1, :, :1, :1].expand(t.shape),
    "one number": lambda t: t[0, 0, 0, 0].expand(t.shape),
}
OF_LAYOUT = {
    "relu": (),
    "relu6": (),
    "hardtanh": (-0.4, 0.7),
    "hardsigmoid": (),
    "leaky_relu": (0.2,),
    "threshold": (0.1, 5.0),
    "dropout": (0.3,),
    "avg_pool2d": (2,),
    "adaptive_avg_pool2d": ((3, 2),),
    "adaptive_max_pool2d": ((3, 2),),
    "max_pool2d": (2,),
    "reflect": ((1, 2, 0, 1), "reflect"),
    "replicate": ((1, 2, 0, 1), "replicate"),
    "prelu": (torch.full((1,), 0.3),),
}


@pytest.mark.parametrize("of_grad", LAID)
@pytest.mark.parametrize("of_x", ["contiguous", "channels last", "transposed", "part"])
@pytest.mark.parametrize("size", [(2, 6, 8, 10), (2, 6, 1, 1), (1, 6, 8, 10), (3, 1, 8, 10)])
@pytest.mark.parametrize("name", OF_LAYOUT)
def test_gradients_lie_in_memory_as_stock_lays_them(name, size, of_x, of_grad):
    """A sum further down takes them in that order. Where a size is 1 a stride may be any."""
    if 1 in size[2:] and ("pool" in name or name in ("reflect", "replicate")):
        pytest.skip("too small")
    if 1 in size and (of_x == "part" or name == "prelu"):
        pytest.skip("a stride that says nothing")
    x = LAID[of_x](torch.randn(size))
    results = []
    for module in (F, M):
        function = getattr(module, "pad" if name in ("reflect", "replicate") else name)
        leaf = x.detach().as_strided(x.shape, x.stride()).requires_grad_()
        torch.manual_seed(0)
        y = function(leaf, *OF_LAYOUT[name])
        given = LAID[of_grad](torch.ones(y.shape).cumsum(0).cumsum(1).cumsum(3))
        results.append((y, *torch.autograd.grad(y, leaf, given)))
    for ours, stock in zip(*reversed(results), strict=True):
        assert_same(ours, stock)
        assert ours.stride() == stock.stride()


@pytest.mark.parametrize("name", OF_LAYOUT)
def test_of_bfloat16_under_autocast(name):
    """Which calls some of them in float32."""
    x = torch.randn(2, 6, 8, 10).bfloat16()
    results = []
    for module in (F, M):
        function = getattr(module, "pad" if name in ("reflect", "replicate") else name)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = function(leaf, *OF_LAYOUT[name])
        results.append((y, *torch.autograd.grad(y, leaf, grad_like(y))))
    for ours, stock in zip(*reversed(results), strict=True):
        assert_same(ours, stock)


@pytest.mark.parametrize("of_x", ["channels last", "transposed"])
@pytest.mark.parametrize("name", ["relu", "hardtanh", "hardsigmoid", "leaky_relu", "dropout"])
def test_gradients_in_place_lie_in_memory_as_stock_lays_them(name, of_x):
    x = LAID[of_x](torch.randn(2, 6, 8, 10))
    grads = []
    for module in (F, M):
        leaf = x.detach().as_strided(x.shape, x.stride()).requires_grad_()
        torch.manual_seed(0)
        y = getattr(module, name)(leaf * 1, inplace=True)
        grads += torch.autograd.grad(y, leaf, LAID[of_x](torch.randn(x.shape)))
    assert_same(*grads)
    assert grads[0].stride() == grads[1].stride()


@pytest.mark.parametrize("of_x", LAID)
def test_dropout_lets_what_is_not_finite_through(of_x):
    """As a loss scaler relies on."""
    x = LAID[of_x](torch.randn(2, 6, 8, 10))
    grads = []
    for module in (F, M):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        given = torch.full(x.shape, math.inf)
        given[:, :3] = math.nan
        module.dropout(leaf, 0.5).backward(given)
        grads.append(leaf.grad)
    assert_same(*grads)


@pytest.mark.parametrize("of_grad", [lambda t: t, _transposed])
@pytest.mark.parametrize("layout", [_last, _every_second, _transposed, lambda t: t])
@pytest.mark.parametrize("shape", [(4, 7, 9, 16), (4, 63, 16), (63, 16), (16,)])
def test_the_gradient_of_a_bias_is_summed_in_the_order_of_stock(shape, layout, of_grad):
    x, weight, bias = layout(torch.randn(shape)), torch.randn(12, 16), torch.randn(12)
    given = of_grad(torch.randn(*shape[:-1], 12))
    grads = []
    for function in (F.linear, lambda *t: M.linear(*t, format=EXACT)):
        tensors = leaves((x, weight, bias))
        grads.append(torch.autograd.grad(function(*tensors), tensors, given))
    for a, b in zip(*grads, strict=True):
        assert_same(a, b)


def _heads(t):
    return t.unflatten(-1, (2, -1)).transpose(1, 2)


PRODUCTS = {
    "heads of one map": ((3, 7, 24), lambda mm, t: mm(
        mm(_heads(t[..., :8]), _heads(t[..., 8:16]).mT).softmax(-1), _heads(t[..., 16:])
    )),
    "scaled before": ((3, 7, 24), lambda mm, t: mm(
        _heads(t[..., :8]) * 0.5, _heads(t[..., 8:16]).mT
    )),
    "matrices": ((7, 24), lambda mm, t: mm(t, t.t())),
    "columns": ((7, 24), lambda mm, t: mm(t.t().clone().t(), t.clone().t())),
    "batch and matrix": ((3, 7, 24), lambda mm, t: mm(t, t[0].t())),
    "parts and matrix": ((3, 7, 24), lambda mm, t: mm(t[:, ::2], t[0].detach().t())),
    "matrix and batch": ((3, 7, 24), lambda mm, t: mm(t[0], t.mT)),
    "a constant and a batch": ((3, 7, 24), lambda mm, t: mm(t[0].detach(), t.mT)),
    "one and many": ((3, 7, 24), lambda mm, t: mm(t[:1], t.mT)),
    "many and one": ((3, 7, 24), lambda mm, t: mm(t, t[:1].mT)),
    "many and one constant": ((3, 7, 24), lambda mm, t: mm(t, t[:1].detach().mT)),
    "expanded": ((3, 7, 24), lambda mm, t: mm(t[:, None], t[None].mT)),
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_views_are_stock_bit_for_bit_and_keep_no_more(name, autocast):
    shape, run = PRODUCTS[name]

    def ours(t):
        return run(lambda a, b: M.matmul(a, b, format=EXACT), t)

    def stock(t):
        return run(torch.matmul, t)

    x = torch.randn(shape)
    out, (grad,) = step(ours, [x], autocast=autocast)
    expected, (wanted,) = step(stock, [x], autocast=autocast)
    assert_same(out, expected)
    assert_same(grad, wanted)
    assert out.stride() == expected.stride()
    if not autocast:
        kept, allowed = (saved_bytes(f, x.clone().requires_grad_()) for f in (ours, stock))
        assert kept <= allowed


@EVERY
def test_no_more_is_kept_than_by_stock(case):
    """The generator's state, 5056 bytes, stands for the mask of attention's dropout."""
    tensors = case.tensors()
    for needs in ([True] * len(tensors), [True] + [False] * (len(tensors) - 1)):
        stock = saved_bytes(case.stock, *leaves(tensors, needs))
        ours = saved_bytes(case.ours, EXACT, *leaves(tensors, needs))
        assert ours <= stock + 5056 * (case.random and case.function != "dropout")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, arguments",
    [("hardtanh", (-0.4, 0.7)), ("hardtanh", (-1.0, 2.0)), ("threshold", (0.1, 5))],
)
def test_what_lies_on_a_bound(name, arguments, dtype):
    """As it is written in each type, and one step to either side."""
    bounds = torch.tensor(arguments).to(dtype).repeat_interleave(3)
    step_ = torch.finfo(dtype).eps * bounds.abs()
    x = bounds + step_ * torch.tensor([-1, 0, 1] * 2, dtype=dtype)
    grads = []
    for module in (F, M):
        leaf = x.clone().requires_grad_()
        getattr(module, name)(leaf, *arguments).sum().backward()
        grads.append(leaf.grad)
    assert_same(*grads)


@EVERY
def test_what_is_not_kept_is_not_read(case, poison):
    """An operator is handed memory of the right layout where its result depends on no element."""
    tensors = case.tensors()
    for i in range(len(tensors)):
        check(case, tensors, [j == i for j in range(len(tensors))])


@EVERY
def test_compiled_as_one_graph(case):
    if case.random:
        pytest.skip("compiled code draws other random numbers")
    torch._dynamo.reset()
    tensors = case.tensors()
    expected, stock = step(case.stock, tensors)
    compiled = torch.compile(lambda *t: case.ours(EXACT, *t), fullgraph=True, backend="aot_eager")
    out, ours = step(compiled, tensors)
    assert_same(out, expected)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d], ids=lambda n: n.__name__)
def test_compiled_for_several_sizes(norm, train):
    torch._dynamo.reset()
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, affine=True), nn.ReLU()).train(train)
    ours = copy.deepcopy(stock)
    convert(ours, dict.fromkeys(ROLES, EXACT))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 8, 8)
        grads = []
        for model in (stock, compiled):
            model.zero_grad()
            model(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [EXACT, memtl.storage.Quantized(8, rebuild=True)], ids=str)
@pytest.mark.parametrize("name", ["silu", "hardswish", "mish", "elu"])
def test_in_place_under_torch_func(name, format):
    """Nothing is shared there."""

    def loss(module, x, **options):
        y = module.gelu(x, **options)
        y = getattr(module, name)(y, inplace=True, **options)
        return (y * y).sum()

    x = torch.randn(4, 6)
    grad = torch.func.grad(lambda t: loss(M, t, format=format))(x)
    expected = torch.func.grad(lambda t: loss(F, t))(x)
    atol = 1e-6 if format is EXACT else 0.05
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=atol)


# ---------------------------------------------------------------------------------------- bytes

B, N, C = 3, 7, 20
TOKENS, IMAGES = (B, N, C), (B, C, 5, 9)


def kept(layer, shape, *, x=True, parameters=False, inplace=False, train=True, skip=False):
    """Bytes that ``layer`` keeps, parameters and buffers apart."""
    layer.train(train).requires_grad_(parameters)
    convert(layer, dict.fromkeys(ROLES, EXACT))
    given = torch.randn(shape, requires_grad=x)
    return saved_bytes(lambda: layer(given * 1 if inplace and x else given))


def bits(shape):
    return math.ceil(math.prod(shape) / 8)


@pytest.mark.parametrize(
    "layer, shape, bytes_",
    [
        (nn.Linear(C, 5), TOKENS, 0),
        (nn.Conv2d(C, 4, 3), IMAGES, 0),
        (nn.Conv2d(C, 4, 1, 2), IMAGES, 0),
        (nn.ConvTranspose2d(C, 4, 3), IMAGES, 0),
        (nn.ReLU(), TOKENS, bits(TOKENS)),
        (nn.ReLU6(), TOKENS, bits(TOKENS)),
        (nn.Hardsigmoid(), TOKENS, bits(TOKENS)),
        (nn.LeakyReLU(), TOKENS, bits(TOKENS)),
        (nn.PReLU(), TOKENS, bits(TOKENS)),
        (nn.Dropout(0.3), TOKENS, bits(TOKENS)),
        # four bits an element of the output, in whole groups of 64
        (nn.MaxPool2d(3, 2), IMAGES, math.ceil(B * C * 2 * 4 / 64) * 32),
        (nn.AvgPool2d(2), IMAGES, 0),
        (nn.GELU(), TOKENS, 4 * math.prod(TOKENS)),
        (nn.SiLU(), TOKENS, 4 * math.prod(TOKENS)),
        (nn.Hardswish(), TOKENS, 4 * math.prod(TOKENS)),
        (nn.Sigmoid(), TOKENS, 4 * math.prod(TOKENS)),
        (nn.LayerNorm(C), TOKENS, 4 * math.prod(TOKENS) + 8 * B * N),
        (nn.RMSNorm(C), TOKENS, 4 * math.prod(TOKENS) + 4 * B * N),
        (nn.GroupNorm(4, C), IMAGES, 4 * math.prod(IMAGES) + 8 * B * 4),
        (nn.BatchNorm2d(C), IMAGES, 4 * math.prod(IMAGES) + 8 * C),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_bytes_of_a_frozen_layer(layer, shape, bytes_):
    assert kept(layer, shape) == bytes_
    layer = copy.deepcopy(layer)
    memtl.unconvert(layer)
    assert kept(layer, shape, x=False) == 0


@pytest.mark.parametrize("function", [F.silu, F.hardswish], ids=lambda f: f.__name__)
def test_in_place_a_copy_is_kept_as_torch_keeps_one(function):
    kind = {F.silu: nn.SiLU, F.hardswish: nn.Hardswish}[function]
    assert kept(kind(inplace=True), TOKENS, inplace=True) == 4 * math.prod(TOKENS)


def test_a_batch_norm_in_evaluation():
    assert kept(nn.BatchNorm2d(C), IMAGES, train=False) == 0
    trained = kept(nn.BatchNorm2d(C), IMAGES, train=False, parameters=True)
    assert trained == 4 * math.prod(IMAGES)
    assert kept(nn.BatchNorm2d(C), IMAGES, x=False, train=False, parameters=True) == trained


def test_a_bias_alone_needs_nothing():
    for layer, shape in (
        (nn.Linear(C, 5), TOKENS),
        (nn.Conv2d(C, 4, 3), IMAGES),
        (nn.LayerNorm(C), TOKENS),
        (nn.GroupNorm(4, C), IMAGES),
        (nn.BatchNorm2d(C).eval(), IMAGES),
    ):
        layer.weight.requires_grad_(False)
        convert(layer, dict.fromkeys(ROLES, EXACT))
        assert saved_bytes(layer, torch.randn(shape)) == 0, layer


# ------------------------------------------------------------------------------------ rebuilding


def attention(x):
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x, x * 2, x * 3))
    return M.scaled_dot_product_attention(q, k, v, format=EXACT).transpose(1, 2).flatten(2)


W, G = torch.rand(C) + 0.5, torch.randn(C)
MEAN, VAR = torch.randn(C), torch.rand(C) + 0.5
MADE = {
    "layer_norm": lambda x: M.layer_norm(x, (C,), W, G, format=EXACT),
    "rms_norm": lambda x: M.rms_norm(x, (C,), W, format=EXACT),
    "rms_norm-llama": lambda x: M.rms_norm(x, (C,), W, 1e-6, format=EXACT, style="llama"),
    "batch_norm": lambda x: M.batch_norm(x, None, None, W, G, True, format=EXACT),
    "batch_norm-evaluation": lambda x: M.batch_norm(
        x, MEAN, VAR, W.clone().requires_grad_(), G, format=EXACT
    ),
    "group_norm": lambda x: M.group_norm(x, 4, W, G, format=EXACT),
    "relu of a norm": lambda x: M.relu(M.batch_norm(x, None, None, W, G, True, format=EXACT)),
    "hardsigmoid of a norm": lambda x: M.hardsigmoid(M.group_norm(x, 2, W, G, format=EXACT)),
    "gate of a norm": lambda x: M.sigmoid(M.group_norm(x, 2, W, G, format=EXACT), format=EXACT),
    "gelu": lambda x: M.gelu(x, format=EXACT),
    "silu in place": lambda x: M.silu(x * 1, True, format=EXACT),
    "hardswish of a norm, in place": lambda x: M.hardswish(
        M.group_norm(x, 2, W, G, format=EXACT), True, format=EXACT
    ),
    "dropout of gelu": lambda x: M.dropout(M.gelu(x, format=EXACT), 0.3),
    "product": lambda x: M.mul(M.gelu(x, format=EXACT), M.silu(x, format=EXACT), format=EXACT),
    "attention": lambda x: attention(x.flatten(2) if x.dim() > 3 else x),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_rebuilt_is_the_tensor_bit_for_bit(name, dtype):
    shape = IMAGES if "norm" in name and "layer" not in name and "rms" not in name else TOKENS
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = MADE[name](x)
    for t in (y, y[1:, ::2], y.transpose(0, 1)):
        found = share.shared(t, EXACT)
        assert found is not None
        assert all(part.untyped_storage()._cdata != t.untyped_storage()._cdata
                   for part in found.tensors)  # fmt: skip
        assert_same(found.unpack(), t.detach())


def test_a_norm_and_its_readers_keep_one_tensor():
    """As lora_A reads the output of a frozen norm."""
    x = torch.randn(TOKENS, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, C))

    def run(x):
        return M.linear(MADE["layer_norm"](x), weight, format=EXACT)

    own = weight.nbytes + W.nbytes + G.nbytes
    assert saved_bytes(run, x) == x.nbytes + 8 * B * N + own
    run(x).backward(torch.ones(B, N, 4))
    ours, weight.grad = weight.grad, None
    F.linear(F.layer_norm(x, (C,), W, G), weight).backward(torch.ones(B, N, 4))
    assert_same(ours, weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_cast_of_autocast_is_rebuilt(dtype):
    x = torch.randn(TOKENS, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, C))
    grads = []
    for norm, linear in ((F.layer_norm, F.linear), (M.layer_norm, M.linear)):
        format = {} if norm is F.layer_norm else {"format": EXACT}
        with torch.autocast("cpu", dtype):
            out = linear(norm(x, (C,), W, G, **format), weight, **format)
        weight.grad = None
        out.backward(torch.ones_like(out))
        grads.append(weight.grad)
    assert_same(*grads)


def test_a_coarser_state_stands_for_no_exact_tensor():
    x = torch.randn(TOKENS, requires_grad=True)
    for format in (memtl.storage.Quantized(8, rebuild=True), Dense("fp32", rebuild=True)):
        assert share.shared(M.layer_norm(x, (C,), format=format), EXACT) is None


@pytest.mark.parametrize("trained", ["norm", "linear", "both"])
def test_a_forward_in_training_before_the_backward_of_one_in_evaluation(trained):
    """It changes running statistics, of which autograd sees no change: as stock's goes on with the
    new ones, and keeps the old output, so does memtl's."""
    stock = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 4)).eval()
    stock[0].requires_grad_(trained != "linear")
    stock[1].requires_grad_(trained != "norm")
    ours = copy.deepcopy(stock)
    convert(ours, dict.fromkeys(ROLES, EXACT))
    grads = []
    x, other = torch.randn(9, C), torch.randn(9, C) + 5
    for model in (stock, ours):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        model.train()(other)
        out.square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*grads, strict=True):
        assert_same(a, b)


def test_a_step_between_forward_and_backward_raises_where_something_is_rebuilt():
    norm, linear = nn.LayerNorm(C), nn.Linear(C, 4)
    model = nn.Sequential(norm, linear)
    convert(model, dict.fromkeys(ROLES, EXACT))
    out = model(torch.randn(TOKENS, requires_grad=True))
    with torch.no_grad():
        norm.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_more_is_kept_than_the_output_of_a_small_batch_norm():
    model = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 4)).eval()
    x = torch.randn(1, C, requires_grad=True)
    stock = saved_bytes(model, x)
    convert(model, dict.fromkeys(ROLES, EXACT))
    assert saved_bytes(model, x) <= stock


@pytest.mark.parametrize("name", MADE)
def test_nothing_outlives_its_tensor(name):
    gc.collect()
    before = len(share._offers)
    shape = IMAGES if "norm" in name and "layer" not in name and "rms" not in name else TOKENS
    for backward in (True, False):
        x = torch.randn(shape, requires_grad=True)
        y = MADE[name](x)
        assert len(share._offers) > before
        if backward:
            y.sum().backward()
        del x, y
        assert len(share._offers) == before  # no cycle: no collector was needed
