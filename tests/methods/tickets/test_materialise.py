import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import memtl
from memtl import Ticket, TicketConfig, assets, draw_ticket
from memtl.methods.tickets import Source
from memtl.methods.tickets.scope import weights_in_scope
from memtl.methods.tickets.tracing import trace
from tests.methods.tickets.small import vit


def timm_model(name: str, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5, **options)


def torchvision_model(name: str, **options) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(num_classes=5, **options)


def bottlenecks() -> nn.Module:
    resnet = pytest.importorskip("timm.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), num_classes=5)


def vgg() -> nn.Module:
    features = [nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(True), nn.MaxPool2d(2)]
    features += [nn.Conv2d(9, 11, 3, padding=1), nn.ReLU(True), nn.AdaptiveAvgPool2d(3)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(99, 13), nn.GELU(), nn.Linear(13, 5))


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(7, 30), nn.BatchNorm1d(30), nn.SiLU(), nn.Dropout(0.1)),
        *(nn.Linear(30, 21), nn.Hardswish(), nn.Linear(21, 5)),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "cnn_glyphs": (lambda: assets.load("cnn_glyphs", 10), (2, 1, 28, 28), (1, 1, 37, 33)),
    "bottlenecks": (bottlenecks, (2, 3, 32, 32), (1, 3, 45, 33)),
    "timm resnet": (lambda: timm_model("test_resnet"), (2, 3, 64, 64), (1, 3, 45, 33)),
    "timm efficientnet": (lambda: timm_model("test_efficientnet"), (2, 3, 32, 32), (1, 3, 45, 33)),
    "timm tf": (
        lambda: timm_model("tf_mobilenetv3_small_minimal_100"), (1, 3, 32, 32), (1, 3, 45, 33)
    ),
    "mobilenet_v2": (
        lambda: torchvision_model("mobilenet_v2", width_mult=0.25), (2, 3, 32, 32), (1, 3, 45, 33)
    ),
    "mobilenet_v3": (
        lambda: torchvision_model("mobilenet_v3_small"), (2, 3, 32, 32), (1, 3, 45, 33)
    ),
    "vgg": (vgg, (2, 3, 16, 16), (1, 3, 13, 21)),
    "mlp": (mlp, (4, 7), (1, 7)),
}  # fmt: skip


def alive(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with running statistics, scales and shifts such as training gives."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for t in (m.weight, m.running_var):
                    t.copy_(torch.rand(t.shape, generator=g) + 0.5)
                for t in (m.bias, m.running_mean):
                    t.copy_(0.3 * torch.randn(t.shape, generator=g))
    return model


def channels(model: nn.Module, sparsity: float, seed: int = 0) -> Ticket:
    config = TicketConfig(
        scheme="random", sparsity=sparsity, pattern="channel", level="layer", seed=seed
    )
    return draw_ticket(model, config)


def without(model: nn.Module, pruned: dict[str, list[int]]) -> Ticket:
    """A ticket of those rows alone, without biases and norms."""
    masks, shapes = {}, {}
    for name, weight in weights_in_scope(model, None).items():
        mask = torch.ones_like(weight.parameter, dtype=torch.bool)
        mask[pruned.get(name, [])] = False
        masks[name], shapes[name] = torch.ops.memtl.bits_pack(mask), tuple(mask.shape)
    return Ticket(masks, shapes, TicketConfig(sparsity=0.5, pattern="channel"), Source("", ""))


def masked(ticket: Ticket, model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    ticket.apply(model, sparse=False)
    return model


def assert_same(model: nn.Module, other: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        wanted, got = model.eval()(x), other.eval()(x)
    assert got.shape == wanted.shape
    assert wanted.std() > 0
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def work(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


SPARSITIES = (0.3, 0.5, 0.8)
LARGE = {"mobilenet_v2": (0.8,), "mobilenet_v3": (0.5,), "timm tf": (0.3,), "cnn_glyphs": (0.5,)}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    torch.manual_seed(0)
    make, *sizes = NETWORKS[name]
    model = alive(make()).eval()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    flops, parameters = work(model, torch.randn(sizes[0])), None
    for seed, sparsity in enumerate(LARGE.get(name, SPARSITIES)):
        ticket = channels(model, sparsity, seed)
        made = ticket.materialise(model)
        reference = masked(ticket, model)
        for size in sizes:
            assert_same(reference, made.model, torch.randn(size))
        assert type(made.model) is type(model)
        assert made.model.state_dict().keys() == before.keys()
        now = work(made.model, torch.randn(sizes[0]))
        assert now < flops
        flops = now
        assert made.parameters_before == sum(p.numel() for p in model.parameters())
        assert made.parameters_after == sum(p.numel() for p in made.model.parameters())
        assert made.parameters_after < (parameters or made.parameters_before)
        parameters = made.parameters_after
        assert 0 < made.removed < made.channels
        assert f"{made.removed:,} of {made.channels:,} channels removed" in str(made)
        if made.ticket is not None:
            assert_same(masked(made.ticket, made.model), made.model, torch.randn(sizes[0]), 1e-12)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_float64_is_exact_to_rounding():
    model = alive(bottlenecks()).eval().double()
    ticket = channels(model, 0.5)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert_same(masked(ticket, model), ticket.materialise(model).model, x, 1e-12)


def test_every_channel_that_can_go_goes():
    # Nothing is residual here: what is left of every layer is what the ticket keeps.
    model = alive(vgg()).eval()
    ticket = without(model, {"0.weight": [0, 4], "4.weight": [1, 2, 10], "8.weight": [12]})
    made = ticket.with_vectors(model).materialise(model)
    shapes = {layer.name: layer.after for layer in made.layers}
    assert shapes == {
        **{"0": (7, 3, 3, 3), "4": (8, 7, 3, 3), "8": (12, 72), "10": (5, 12)},
    }
    assert made.removed == 6
    assert made.left == 0
    assert made.ticket is None
    assert [made.model[i].num_features for i in (1,)] == [7]
    assert (made.model[8].in_features, made.model[8].out_features) == (72, 12)
    assert_same(masked(ticket.with_vectors(model), model), made.model, torch.randn(2, 3, 16, 16))


def pair(padding: int, bias: bool = True, act: nn.Module | None = None) -> nn.Module:
    act = nn.Sigmoid() if act is None else act
    second = nn.Conv2d(8, 4, 3, padding=padding, bias=bias)
    return nn.Sequential(nn.Conv2d(3, 8, 3), act, second, nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.parametrize("padding, bias, gone", [(0, True, 2), (1, True, 0), (0, False, 0)])
def test_constants_go_into_the_bias_where_there_is_no_border(padding, bias, gone):
    size = (2, 3, 10, 10) if padding == 0 else (2, 3, 8, 8)
    model = pair(padding, bias)
    ticket = without(model, {"0.weight": [1, 5]})
    made = ticket.materialise(model)
    assert made.model[0].out_channels == made.model[2].in_channels == 8 - gone
    assert made.layers[0].left == 2 - gone
    assert_same(masked(ticket, model), made.model, torch.randn(size))


def test_a_bias_that_is_pruned_takes_no_constants():
    model = pair(0)
    ticket = without(model, {"0.weight": [1]})
    bits = torch.ops.memtl.bits_pack(torch.tensor([True, False, True, True]))
    ticket.masks["2.bias"], ticket.shapes["2.bias"] = bits, (4,)
    made = ticket.materialise(model)
    assert made.model[2].in_channels == 8
    assert_same(masked(made.ticket, made.model), masked(ticket, model), torch.randn(2, 3, 10, 10))


def test_a_bias_of_two_layers_takes_no_constants():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(3, 4, 1)
            self.c.bias = self.b.bias

        def forward(self, x):
            return torch.cat([self.b(self.a(x).sigmoid()), self.c(x)], 1)

    model = Shared()
    ticket = without(model, {"a.weight": [0, 1]})
    made = ticket.materialise(model)
    assert made.model.c.bias is made.model.b.bias
    assert_same(masked(ticket, model), made.model, torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize(
    ("make", "name", "filters", "left"),
    [
        (lambda: nn.Linear(4, 6), "", (6,), (3,)),
        (
            lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.ConvTranspose2d(6, 3, 2)),
            "0",
            (6, 3),
            (3, 1),
        ),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), "0.in_proj_weight", (12, 4), (6, 2)),
    ],
)
def test_layers_that_nothing_is_known_of_are_reported(make, name, filters, left):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = make()

        def forward(self, x):
            return x

    model = make() if name == "" else Reading()
    made = channels(model, 0.5).materialise(model)
    where = name if name == "" else f"inside.{name}"
    assert made.layers[0].name == where
    assert tuple(layer.channels for layer in made.layers) == filters
    assert tuple(layer.left for layer in made.layers) == left
    assert (made.channels, made.removed, made.left) == (sum(filters), 0, sum(left))
    assert str(made).startswith(f"0 of {sum(filters)} channels removed (0.0%), {sum(left)} pruned")


class Reads(nn.Module):
    """Two convolutions, and what is done with their outputs."""

    def __init__(self, read, width: int = 6):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 5, 1)
        self.read = read

    def forward(self, x):
        return self.head(self.norm(self.read(self.a(x), self.b(x)))).mean((2, 3))


def stale(a: Tensor, b: Tensor) -> Tensor:
    c = torch.relu_(a)
    return b * 0.5 + a + c


READS = {
    "sum": (lambda a, b: a + b, 6, {"a": [0, 1], "b": [1, 2]}, (5, 5)),
    "difference": (lambda a, b: a - b, 6, {"a": [0, 1], "b": [1, 2]}, (5, 5)),
    "scaled": (lambda a, b: (2 * a + b / 3).relu(), 6, {"a": [0, 1], "b": [1]}, (5, 5)),
    "product": (lambda a, b: a * b, 6, {"a": [0, 1], "b": [1, 2]}, (3, 3)),
    "gate": (lambda a, b: a * b.mean((2, 3), keepdim=True).sigmoid(), 6, {"a": [0]}, (5, 5)),
    "gate not enough": (lambda a, b: a * b.sigmoid(), 6, {"b": [0]}, (6, 6)),
    "cat": (lambda a, b: torch.cat([a, b], 1), 12, {"a": [0, 1], "b": [5]}, (4, 5)),
    "cat the other way": (lambda a, b: torch.cat((a, b), dim=2), 6, {"a": [2], "b": [2]}, (6, 6)),
    "in place": (stale, 6, {"a": [0, 1], "b": [1]}, (5, 5)),
    "reordered": (lambda a, b: a.flip(1) + b, 6, {"a": [0, 1], "b": [1]}, (6, 6)),
    "softmax": (lambda a, b: a.softmax(1) + b, 6, {"a": [0], "b": [0]}, (6, 6)),
    "split": (lambda a, b: torch.cat(a.chunk(2, 1), 1) + b, 6, {"a": [0], "b": [0]}, (6, 6)),
    "padded": (lambda a, b: F.pad(a, (1, 1))[..., 1:-1] + b, 6, {"a": [0], "b": [0]}, (6, 6)),
    "averages": (lambda a, b: F.avg_pool2d(a + b, 3, 1, 1), 6, {"a": [0], "b": [0]}, (5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("vectors", [True, False])
def test_what_reads_a_channel(name, vectors):
    read, width, pruned, kept = READS[name]
    torch.manual_seed(1)
    model = alive(Reads(read, width)).eval()
    ticket = without(model, {f"{key}.weight": rows for key, rows in pruned.items()})
    if vectors:
        ticket = ticket.with_vectors(model)
    made = ticket.materialise(model)
    if vectors:
        assert (made.model.a.out_channels, made.model.b.out_channels) == kept
    assert_same(masked(ticket, model), made.model, torch.randn(2, 3, 9, 9))


def test_convolutions_in_groups_lose_whole_groups():
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.Conv2d(12, 5, 1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 3, 8, 8)
    model(x)
    rows = {"0.weight": [0, 1, 2], "1.weight": [0, 1, 2, 3, 9]}
    ticket = without(model, rows).with_vectors(model)
    made = ticket.materialise(model)
    grouped = made.model[1]
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (6, 9, 3)
    assert [layer.left for layer in made.layers][:2] == [1, 2]
    assert_same(masked(ticket, model), made.model, x)


def test_depthwise_with_more_outputs_than_inputs():
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 5, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ticket = without(model, {"0.weight": [2], "2.weight": [0, 1, 2]}).with_vectors(model)
    made = ticket.materialise(model)
    assert (made.model[2].groups, made.model[2].out_channels) == (2, 4)
    assert_same(masked(ticket, model), made.model, torch.randn(2, 3, 9, 9))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.tied, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.tied.weight = self.again.weight

    def forward(self, x):
        x = self.again(self.again(self.first(x)).relu())
        x = self.head(self.tied(x))
        return x.view(x.size(0), -1)


def test_what_is_used_twice():
    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(2, 3, 5, 5)
    ticket = without(model, {"first.weight": [0, 1], "again.weight": [0, 2]}).with_vectors(model)
    made = ticket.materialise(model)
    assert made.model.tied.weight is made.model.again.weight
    assert_same(masked(ticket, model), made.model, x)
    model.tied.weight = nn.Parameter(model.again.weight.detach() + 0.1)  # no more shared
    ticket = without(model, {"again.weight": [0, 2], "first.weight": [0, 1], "tied.weight": [3]})
    made = ticket.with_vectors(model).materialise(model)
    assert made.model.again.out_channels == 5  # zero where it reads, and where it is read
    assert_same(masked(ticket.with_vectors(model), model), made.model, x)


def test_a_layer_that_computes_its_weight_or_has_hooks_is_left_whole():
    def build():
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 5, 1))

    x = torch.randn(2, 3, 8, 8)
    model = build()
    ticket = without(model, {"0.weight": [1]}).with_vectors(model)
    assert ticket.materialise(model).removed == 1
    model[2].register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    made = ticket.materialise(model)
    assert (made.removed, made.left) == (0, 1)
    assert_same(masked(ticket, model), made.model, x)
    std = pytest.importorskip("timm.layers").StdConv2d
    model = build()
    model[2] = std(6, 6, 3, bias=True)
    made = ticket.materialise(model)
    assert made.removed == 0
    assert_same(masked(ticket, model), made.model, x)


def test_a_layer_keeps_a_channel():
    # The second layer's survivor reads nothing that lives.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1))
    ticket = without(model, {"0.weight": [0, 1, 2]}).with_vectors(model)
    mask = torch.zeros(4, 4, 1, 1, dtype=torch.bool)
    mask[0, 1] = True
    ticket.masks["2.weight"] = torch.ops.memtl.bits_pack(mask)
    made = ticket.with_vectors(model).materialise(model)
    assert (made.model[0].out_channels, made.model[2].out_channels) == (1, 1)
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        wanted = masked(ticket.with_vectors(model), model)(x)
        torch.testing.assert_close(made.model(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_transformer_loses_hidden_features():
    model = vit().eval()
    ticket = channels(model, 0.5)
    made = ticket.materialise(model)
    assert {layer.name: layer.after[0] for layer in made.layers}["blocks.0.mlp.fc1"] == 64
    assert_same(masked(ticket, model), made.model, torch.randn(2, 3, 16, 16))


def steps(model: nn.Module, x: Tensor, count: int = 2) -> Tensor:
    """The outputs of a few steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    outputs = []
    for _ in range(count):
        y = model.train()(x)
        outputs.append(y.detach())
        optimizer.zero_grad()
        (y - 1).square().mean().backward()
        optimizer.step()
    return torch.stack(outputs)


@pytest.mark.parametrize("name", ["cnn_glyphs", "timm resnet", "vgg"])
def test_training_goes_on_as_that_of_the_masked_model(name):
    torch.manual_seed(0)
    make, _, _ = NETWORKS[name]
    model = alive(make()).double()
    x = torch.randn(4, 1 if name == "cnn_glyphs" else 3, 24, 24, dtype=torch.float64)
    ticket = channels(model, 0.5)
    made = ticket.materialise(model)
    assert made.model.training
    if made.ticket is not None:
        made.ticket.apply(made.model)
    reference = masked(ticket, model)
    torch.testing.assert_close(steps(made.model, x), steps(reference, x), rtol=1e-7, atol=1e-9)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in made.model.parameters())
    assert_same(reference, made.model, x, 1e-7)


def test_what_is_made_is_a_model_as_any():
    model = alive(assets.load("cnn_glyphs", 10)).eval()
    model.conv_stem.weight.requires_grad_(False)
    ticket = channels(model, 0.5)
    made = ticket.materialise(model).model
    x = torch.randn(2, 1, 28, 28)
    assert not made.conv_stem.weight.requires_grad
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert torch.equal(other(x), made(x))
    again = ticket.materialise(model).model
    again.load_state_dict({key: torch.zeros_like(t) for key, t in made.state_dict().items()})
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))
    trace(made)  # and can be pruned again
    assert channels(made, 0.3).materialise(made).removed > 0


def test_a_model_with_the_ticket_keeps_it():
    model = alive(assets.load("cnn_glyphs", 10)).eval()
    ticket = channels(model, 0.5)
    made = ticket.materialise(model)
    ticket.apply(model)
    again = ticket.materialise(model)
    assert Ticket.of(model) == ticket
    assert again.ticket == made.ticket
    x = torch.randn(1, 1, 28, 28)
    assert torch.equal(again.model(x), made.model(x))
    with pytest.raises(ValueError, match="another one"):
        channels(made.model, 0.3).materialise(model)


@pytest.mark.parametrize("config", [memtl.BackRazorConfig(keep=0.5), memtl.LowBitConfig(bits=8)])
def test_converted_models_stay_converted(config):
    model = alive(assets.load("cnn_glyphs", 10)).eval()
    ticket = channels(model, 0.5)
    reference = ticket.materialise(model).model
    memtl.apply(model, config)
    assert ticket.with_vectors(model) == ticket
    made = ticket.materialise(model).model
    x = torch.randn(2, 1, 28, 28)
    assert_same(reference, made, x, 1e-6)
    made.train()(x).sum().backward()
    assert made.conv_head.weight.grad.any()
    assert memtl.unconvert(made) > 0


def test_bad_input():
    model = vgg()
    with pytest.raises(ValueError, match="no whole channel"):
        draw_ticket(model, TicketConfig(sparsity=0.3)).materialise(model)
    ticket = channels(model, 0.5)
    with pytest.raises(TypeError, match="nn.Module"):
        ticket.materialise("model")
    with pytest.raises(ValueError, match="does not fit"):
        ticket.materialise(mlp())

    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = vgg()

        def forward(self, x):
            return self.layers(x) if x.sum() > 0 else -self.layers(x)

    model = Decides()
    with pytest.raises(ValueError, match=r"Decides cannot be traced by torch.fx: TraceError"):
        channels(model, 0.5).materialise(model)
