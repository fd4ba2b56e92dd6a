"""draw_ticket(scheme="learned"): scores on frozen weights, and that the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memtl
from memtl import Ticket, TicketConfig, draw_ticket
from memtl.nn import compress_weights
from tests.helpers import assert_same
from tests.methods.tickets.small import loss, network
from tests.methods.tickets.test_drawing import assert_same_state, copied, masks_of


def learned(sparsity: float = 0.6, **options) -> TicketConfig:
    return TicketConfig(scheme="learned", sparsity=sparsity, **options)


def trains(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Training:
    """Some steps of SGD on whatever requires a gradient."""

    def __init__(self, x: Tensor, steps: int = 3, rate: float = 0.5):
        self.x, self.steps, self.rate = x, steps, rate

    def __call__(self, model, round, on_step):
        assert round == 1
        self.names = list(trains(model))
        model.train()
        optimizer = torch.optim.SGD(trains(model).values(), self.rate, momentum=0.9)
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            loss(model, self.x).backward()
            assert all(p.grad is not None for p in trains(model).values())
            optimizer.step()
            on_step(step)


# what is learned


@pytest.mark.parametrize("level", ["global", "layer"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bert", torch.float32),
        *(("convs", t) for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    ],
)
def test_untrained_scores_draw_the_ticket_of_magnitude(name, level, dtype):
    model, x = network(name)
    model.to(dtype)
    expected = draw_ticket(model, TicketConfig(sparsity=0.6, level=level))
    never = draw_ticket(model, learned(level=level), train=lambda *_: None)
    assert never == expected
    assert never.source.scheme == "learned" and never.config == learned(level=level)
    assert never.source.fingerprint == expected.source.fingerprint
    if name == "convs" and dtype == torch.float32:
        assert draw_ticket(model, learned(level=level), train=Training(x, rate=0)) == expected


@pytest.mark.parametrize("level", ["global", "layer"])
def test_the_largest_scores_survive(level):
    model, x = network("convs")
    scores = {}

    def train(model, round, on_step):
        Training(x)(model, round, on_step)
        for name, p in model.named_parameters():
            if name.endswith("_scores"):
                scores[name.replace("memtl_weight_scores", "weight")] = p.detach().abs().clone()

    ticket = draw_ticket(model, learned(level=level), train=train)
    masks = masks_of(ticket)
    assert masks.keys() == scores.keys()
    for group in [[name] for name in masks] if level == "layer" else [list(masks)]:
        values = torch.cat([scores[name].flatten() for name in group])
        kept = torch.cat([masks[name].flatten() for name in group])
        assert kept.sum() == len(kept) - round(0.6 * len(kept))
        assert values[kept].min() >= values[~kept].max()
    assert ticket != draw_ticket(model, TicketConfig(sparsity=0.6, level=level))


def test_scores_and_the_head_train_and_nothing_else():
    model, x = network("bert")
    model.classifier.bias.requires_grad_(False)
    training = Training(x)
    draw_ticket(model, learned(scope=("encoder.layer.1.*",)), train=training)
    assert training.names[-1] == "classifier.weight"
    assert len(training.names) == 7  # six weights of a layer
    assert all(name.endswith(".memtl_weight_scores") for name in training.names[:-1])


def test_a_shared_weight_has_one_score():
    model, x = network("bert")
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.query.weight = first.query.weight
    training = Training(x)
    ticket = draw_ticket(model, learned(), train=training)
    assert sum("query" in name for name in training.names) == 1
    ticket.apply(model)
    assert second.query.weight is first.query.weight


def test_attention_of_torch_is_learned_too():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(layer, nn.Linear(16, 3)), torch.randn(4, 5, 16)
    training = Training(x, rate=5.0)
    ticket = draw_ticket(model, learned(level="layer"), train=training)
    assert "0.self_attn.memtl_in_proj_weight_scores" in training.names
    one_shot = draw_ticket(model, TicketConfig(sparsity=0.6, level="layer"))
    name = "0.self_attn.in_proj_weight"
    assert not torch.equal(ticket.masks[name], one_shot.masks[name])


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
def test_what_is_learned_serves_the_task_better(sparsity):
    """With the weights as they are, on data that was not trained on."""
    torch.manual_seed(3)
    layers = [nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4)]
    model, rule = nn.Sequential(*layers), torch.randn(20, 4)
    x, other = torch.randn(512, 20), torch.randn(512, 20)
    y, wanted = (x @ rule).argmax(1), (other @ rule).argmax(1)

    def train(model, round, on_step):
        optimizer = torch.optim.SGD(trains(model).values(), 10.0, momentum=0.9)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    losses, right = [], []
    for ticket in (
        draw_ticket(model, learned(sparsity, level="layer"), train=train),
        draw_ticket(model, TicketConfig(sparsity=sparsity, level="layer")),
    ):
        pruned = copy.deepcopy(model)
        ticket.apply(pruned)
        out = pruned(other)
        losses.append(F.cross_entropy(out, wanted).item())
        right.append((out.argmax(1) == wanted).float().mean().item())
    assert losses[0] < 0.95 * losses[1]
    assert right[0] > right[1] + 0.15


# what is left of it


def test_the_model_is_left_as_it_was_whatever_happens():
    model, x = network("convs")
    model.train()[1].eval()
    model[8].weight.requires_grad_(False)
    model[8].bias.grad = grad = torch.randn(3)
    before, classes = copied(model), [type(m) for m in model.modules()]
    identities = {name: id(p) for name, p in model.named_parameters()}

    def check():
        assert_same_state(copied(model), before)
        assert {name: id(p) for name, p in model.named_parameters()} == identities
        assert [type(m) for m in model.modules()] == classes
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert model.training and not model[1].training
        assert model[8].bias.grad is grad and model[0].weight.grad is None
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["8.weight"]

    draw_ticket(model, learned(), train=Training(x))
    check()

    def fails(model, round, on_step):
        Training(x)(model, round, on_step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_ticket(model, learned(), train=fails)
    check()

    def diverges(model, round, on_step):
        with torch.no_grad():
            model[0].memtl_weight_scores[0, 0] = torch.nan
        model(x)

    with pytest.raises(ValueError, match="^0.weight holds .* not finite among its scores"):
        draw_ticket(model, learned(), train=diverges)
    check()

    def thaws(model, round, on_step):
        model.requires_grad_(True)
        loss(model, x).backward()
        torch.optim.SGD(model.parameters(), 0.5).step()

    with pytest.raises(ValueError, match="train may not change 0.bias, which is frozen"):
        draw_ticket(model, learned(), train=thaws)
    check()

    def takes_parts(model, round, on_step):
        y = x
        for module in model:
            y = module(y)
        y.square().sum().backward()
        torch.optim.SGD(trains(model).values(), 0.5).step()

    with pytest.raises(ValueError, match="has to call the Sequential itself"):
        draw_ticket(model, learned(), train=takes_parts)
    check()


def test_running_statistics_follow_the_mode_and_go_back():
    model, x = network("convs")
    before = model[1].running_mean.clone()
    seen = {}

    def train(model, round, on_step):
        for mode in (False, True):
            model.train(mode)
            model(x)
            seen[mode] = model[1].running_mean.clone()

    draw_ticket(model, learned(), train=train)
    assert_same(seen[False], before)
    assert not torch.equal(seen[True], before)
    assert_same(model[1].running_mean, before)


def test_a_converted_model():
    model, x = network("vit")
    expected = draw_ticket(model, learned(), train=Training(x))
    memtl.apply(model, memtl.FrozenConfig())
    assert draw_ticket(model, learned(), train=Training(x)) == expected
    memtl.unconvert(model)
    memtl.apply(model, memtl.BackRazorConfig())
    close = draw_ticket(model, learned(), train=Training(x))
    assert close.overlap(expected) > 0.5 and close.sparsity == expected.sparsity
    memtl.unconvert(model)


# on disk


def test_a_finished_draw_is_found_again(tmp_path):
    model, x = network("bert")
    config = learned(rewind_step=3)  # of an iterative draw; here it says nothing
    with torch.no_grad():
        head = model.classifier.weight.clone()

    def interrupted(model, round, on_step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_ticket(model, config, train=interrupted, directory=tmp_path)
    with torch.no_grad():  # another head: the first one counts
        model.classifier.weight.normal_()
    heads = []

    def train(model, round, on_step):
        heads.append(model.classifier.weight.detach().clone())
        Training(x)(model, round, on_step)

    ticket = draw_ticket(model, config, train=train, directory=tmp_path)
    assert_same(heads[0], head)
    assert Ticket.load(tmp_path / "round-01.safetensors") == ticket

    def never(model, round, on_step):
        raise AssertionError

    assert draw_ticket(model, config, train=never, directory=tmp_path) == ticket
    with pytest.raises(ValueError, match="level was 'global', is 'layer'"):
        draw_ticket(model, learned(level="layer"), train=never, directory=tmp_path)


# what is refused


def test_what_is_refused():
    model, x = network("convs")
    with pytest.raises(TypeError, match="a learned draw needs train, a function, got None"):
        draw_ticket(model, learned())
    ticket = draw_ticket(model, TicketConfig(sparsity=0.5))
    ticket.apply(model)
    with pytest.raises(ValueError, match="has a ticket"):
        draw_ticket(model, learned(), train=Training(x))
    ticket.remove(model)
    model[8].requires_grad_(False)
    compress_weights(model)
    with pytest.raises(ValueError, match="8.weight is in 8 bits.*expand_weights first"):
        draw_ticket(model, learned(), train=Training(x))
    recurrent = nn.ModuleDict({"rnn": nn.GRU(4, 4), "out": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="rnn.weight_.h_l0 is a recurrent layer's"):
        draw_ticket(recurrent, learned(scope=("*",)), train=Training(x))


def test_a_layer_that_would_be_empty():
    model, x = network("convs")
    with torch.no_grad():
        model[0].weight.mul_(1e-4)
    with pytest.raises(ValueError, match="no weight at all survives in 0.weight"):
        draw_ticket(model, learned(0.9), train=Training(x))


# patterns


@pytest.mark.parametrize("level", ["global", "layer"])
@pytest.mark.parametrize("pattern", ["row", "kernel", "channel", "1:7"])
def test_scores_choose_whole_groups(pattern, level):
    model, x = network("convs")
    options = {"sparsity": 6 / 7 if ":" in pattern else 0.5, "pattern": pattern, "level": level}
    if ":" in pattern:  # 3 inputs of the first layer, one of the second, 5 and 568
        options["scope"] = ("4.weight",)
    never = draw_ticket(model, TicketConfig(scheme="learned", **options), train=lambda *_: None)
    assert never == draw_ticket(model, TicketConfig(**options))
    scores = {}

    def train(model, round, on_step):
        for name, p in trains(model).items():
            scores[name.replace("memtl_weight_scores", "weight")] = torch.randn_like(p)
            p.data.copy_(scores[name.replace("memtl_weight_scores", "weight")])
        loss(model, x).backward()

    ticket = draw_ticket(model, TicketConfig(scheme="learned", **options), train=train)
    assert ticket != never
    with torch.no_grad():  # the scores in the place of the weights draw the same
        for name, value in scores.items():
            model.get_parameter(name).copy_(value)
    assert draw_ticket(model, TicketConfig(**options)) == ticket
