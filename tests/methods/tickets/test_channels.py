import copy

import pytest
import torch
from torch import nn

import memtl
from memtl import Ticket, TicketConfig, draw_ticket
from memtl.methods.tickets import CompactOptimizer, channel_vectors, parameter_masks
from memtl.reference.bits import bits_unpack
from tests.methods.tickets.small import bert, vit


class Net(nn.Module):
    """A residual block with a depthwise convolution; images [B, 3, H, W]."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.widen, self.widen_norm = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.depth_norm = nn.BatchNorm2d(12)
        self.narrow, self.sum_norm = nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        y = torch.sigmoid(self.widen_norm(self.widen(x)) * 2)
        y = nn.functional.relu6(self.depth_norm(self.depth(y)))
        x = self.sum_norm(x + self.narrow(y))
        return self.head(self.hidden(x.mean((2, 3))))


def test_what_belongs_to_a_channel():
    assert channel_vectors(Net()) == {
        "stem.weight": ("stem.bias", "stem_norm.weight", "stem_norm.bias"),
        # sigmoid(0) is not zero: the depthwise convolution behind it sees 0.5
        "widen.weight": ("widen_norm.weight", "widen_norm.bias"),
        "depth.weight": ("depth.bias", "depth_norm.weight", "depth_norm.bias"),
        "narrow.weight": ("narrow.bias",),  # the norm behind reads the sum
        "hidden.weight": ("hidden.bias",),
    }


def test_through_activations_to_the_depthwise_convolution():
    depth = nn.Conv2d(5, 5, 3, groups=5, bias=False)
    layers = [nn.Conv2d(3, 5, 3), nn.Hardswish(), nn.MaxPool2d(2), depth, nn.BatchNorm2d(5)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.BatchNorm1d(20))
    assert channel_vectors(model) == {
        "0.weight": ("0.bias", "4.weight", "4.bias"),
        "3.weight": ("4.weight", "4.bias"),
    }


def test_a_norm_that_is_called_twice_belongs_to_nobody():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1, bias=False), norm)
    assert channel_vectors(model) == {"0.weight": ("0.bias",)}


def test_what_others_hold_too_belongs_to_nobody():
    layers = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers)
    model[3].weight, model[2].bias = model[1].weight, model[0].bias
    assert channel_vectors(model) == {"0.weight": ("1.bias",), "2.weight": ("3.bias",)}
    model[2].weight = model[0].weight  # now one filter has both biases, and both norms behind it
    assert channel_vectors(model) == {"0.weight": ("0.bias", "1.weight", "1.bias", "3.bias")}


def test_behind_a_norm_without_a_shift_nothing_is_zero():
    depth = nn.Conv2d(5, 5, 3, groups=5)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False), depth)
    assert channel_vectors(model) == {"0.weight": ("0.bias",), "2.weight": ("2.bias",)}


def test_a_model_that_cannot_be_traced_has_its_biases():
    found = channel_vectors(bert())
    assert found["encoder.layer.0.intermediate.dense.weight"] == (
        "encoder.layer.0.intermediate.dense.bias",
    )
    assert all(vectors == (f"{name[:-6]}bias",) for name, vectors in found.items())


def drawn(model: nn.Module, **options) -> Ticket:
    config = {"sparsity": 0.5, "pattern": "channel", "level": "layer", **options}
    return draw_ticket(model, TicketConfig(**config))


def rows(ticket: Ticket, name: str) -> torch.Tensor:
    size, *rest = ticket.shapes[name]
    mask = bits_unpack(ticket.masks[name], size * torch.Size(rest).numel())
    return mask.view(size, -1).any(1)


def test_drawn_tickets_have_the_vectors_of_their_channels():
    model = Net()
    ticket = drawn(model)
    for name, vectors in channel_vectors(model).items():
        for vector in vectors:
            assert torch.equal(rows(ticket, vector), rows(ticket, name)), vector
    assert {layer.name for layer in ticket.layers} == set(draw_names(model))
    assert {layer.name for layer in ticket.vectors} == ticket.masks.keys() - set(draw_names(model))
    assert drawn(model, scheme="random").vectors
    assert not draw_ticket(model, TicketConfig(sparsity=0.5)).vectors


def draw_names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.dim() > 1 and not n.startswith("head")]


def test_a_vector_of_two_layers_keeps_what_both_keep():
    layers = [nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 9, 3, groups=9), nn.BatchNorm2d(9)]
    model = nn.Sequential(*layers)
    ticket = drawn(model)
    assert torch.equal(rows(ticket, "3.bias"), rows(ticket, "0.weight") & rows(ticket, "2.weight"))


def test_figures_are_of_weights():
    model = Net()
    ticket = drawn(model)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    total = sum(sizes[name] for name in draw_names(model))
    assert sum(layer.size for layer in ticket.layers) == total
    assert ticket.sparsity == pytest.approx(0.5, abs=0.02)
    assert f"of {total:,} weights survive" in str(ticket)
    assert "norm" not in str(ticket)
    applied = ticket.apply(model)
    assert applied.total == total
    assert applied.mask_bytes == ticket.nbytes == sum(b.nbytes for b in ticket.masks.values())


def test_pruned_channels_are_zero_whatever_trains():
    model = Net()
    ticket = drawn(model)
    ticket.apply(model)
    other = copy.deepcopy(model)
    other.load_state_dict({key: torch.ones_like(t) for key, t in model.state_dict().items()})
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
        CompactOptimizer(other.parameters(), parameter_masks(other), torch.optim.AdamW, lr=0.1),
    ]
    for net, optimizer in zip((model, other), optimizers, strict=True):
        assert Ticket.of(net) == ticket
        for _ in range(2):
            net(torch.randn(4, 3, 9, 9)).square().sum().backward()
            optimizer.step()
        for name in ticket.masks:
            parameter, kept = net.get_parameter(name), rows(ticket, name)
            assert not parameter[~kept].any(), name
            assert (parameter[kept] != 0).any(), name
        with torch.no_grad():
            x = net.eval().stem_norm(net.stem(torch.randn(2, 3, 9, 9)))
        assert not x[:, ~rows(ticket, "stem.weight")].any()
    ticket.remove(model)
    assert not isinstance(model.stem_norm, memtl.nn.masked.MaskedWeight)


def test_files_keep_vectors(tmp_path):
    model = Net()
    ticket = drawn(model)
    loaded = Ticket.load(ticket.save(tmp_path / "ticket.safetensors", model))
    assert loaded == ticket
    assert loaded.values["stem_norm.bias"].shape == (3,)
    other = Net()
    loaded.restore(other)
    kept = rows(ticket, "stem.weight")
    assert torch.equal(other.stem.bias[kept], model.stem.bias[kept])
    assert not other.stem.bias[~kept].any()


def test_iterative_draws_have_them_and_prune_among_what_is_left(tmp_path):
    model = Net()
    config = TicketConfig(
        scheme="iterative", sparsity=0.5, amount=0.25, pattern="channel", level="layer"
    )
    zero = []

    def train(net, round, on_step):
        norm = net.stem_norm
        zero.append(int((norm.weight == 0).sum()))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)

    ticket = draw_ticket(model, config, train=train, directory=tmp_path)
    assert zero[0] == 0 < zero[1]
    assert torch.equal(rows(ticket, "stem_norm.bias"), rows(ticket, "stem.weight"))
    first = Ticket.load(tmp_path / "round-01.safetensors")
    for name in ticket.masks:
        assert not (rows(ticket, name) & ~rows(first, name)).any()


def test_learned_masks_train_with_the_channels_of_the_ticket():
    model, x, seen = Net(), torch.randn(2, 3, 9, 9), []
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_()

    def train(net, round, on_step):
        scores = [p for n, p in net.named_parameters() if n.endswith("_scores")]
        assert len(scores) == 5  # one a layer: vectors have none
        for p in scores:
            p.data.normal_()
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 5.0)
        for _ in range(2):
            optimizer.zero_grad()
            net.train()(x).square().mean().backward()
            optimizer.step()
        seen.append(net.eval()(x).detach())

    config = TicketConfig(scheme="learned", sparsity=0.5, pattern="channel", level="layer")
    state = copy.deepcopy(model.state_dict())
    copied = copy.deepcopy(model)

    def keep(net, round, on_step):
        train(net, round, on_step)
        buffers = dict(net.named_buffers())
        copied.load_state_dict({k: v for k, v in net.state_dict().items() if k in state})
        assert buffers["stem_norm.memtl_bias_bits"].dtype == torch.uint8

    ticket = draw_ticket(model, config, train=keep)
    assert ticket != drawn(model)
    assert ticket.vectors
    ticket.apply(copied)
    torch.testing.assert_close(copied.eval()(x), seen[0])
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert not any("memtl" in name for name, _ in model.named_buffers())


def test_shuffled_tickets_get_theirs_again():
    model = Net()
    shuffled = drawn(model).shuffled(1)
    assert not shuffled.vectors
    again = shuffled.with_vectors(model)
    assert torch.equal(rows(again, "stem_norm.weight"), rows(shuffled, "stem.weight"))
    assert again.layers == shuffled.layers
    assert drawn(model).overlap(again) == drawn(model).overlap(shuffled)
    with pytest.raises(ValueError, match="does not fit"):
        again.with_vectors(vit())


@pytest.mark.parametrize("config", [memtl.BackRazorConfig(keep=0.5), memtl.LowBitConfig(bits=8)])
def test_under_conversion(config):
    models = [Net(), None]
    ticket = drawn(models[0])
    models[1] = copy.deepcopy(models[0])
    ticket.apply(models[0])
    memtl.apply(models[0], config)
    memtl.apply(models[1], config)
    ticket.apply(models[1])
    x = torch.randn(4, 3, 9, 9)
    for model in models:
        model(x).square().sum().backward()
        pruned = ~rows(ticket, "stem.weight")
        assert not model.stem_norm.weight.grad[pruned].any()
        assert model.stem_norm.weight.grad[~pruned].all()
        assert not model.stem.bias.grad[pruned].any()
    grads = [[p.grad for p in model.parameters()] for model in models]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_linear_layers_with_pruned_biases():
    model = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 8))
    ticket = drawn(model)
    other = copy.deepcopy(model)
    assert ticket.apply(model, sparse=True).sparse == ("0.weight", "2.weight")
    ticket.apply(other, sparse=False)
    x = torch.randn(16, 40)
    torch.testing.assert_close(model(x), other(x))
    model(x).sum().backward()
    assert not model[0].bias.grad[~rows(ticket, "0.weight")].any()
