"""draw_ticket: what survives, round after round, and that the model is left as it was."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import memtl
from memtl import Ticket, TicketConfig, draw_ticket
from memtl.reference.bits import bits_unpack
from tests.helpers import assert_same
from tests.methods.tickets import small
from tests.methods.tickets.small import loss, network, pruned, words


def bert(kind: str = "ForSequenceClassification") -> nn.Module:
    """Without dropout, whose numbers would be others after an interruption."""
    return small.bert(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def masks_of(ticket: Ticket) -> dict[str, torch.Tensor]:
    return {
        name: bits_unpack(bits, torch.Size(ticket.shapes[name]).numel()).view(ticket.shapes[name])
        for name, bits in ticket.masks.items()
    }


def weights_of(model: nn.Module, ticket: Ticket) -> dict[str, torch.Tensor]:
    base = getattr(model, "base_model", model)
    return {name: base.get_parameter(name).detach() for name in ticket.masks}


# at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", ["global", "layer"])
def test_the_largest_survive(level, dtype):
    model, _ = network("convs")
    model.to(dtype)
    model[3].weight.data = model[3].weight.data.transpose(2, 3)  # not contiguous
    ticket = draw_ticket(model, TicketConfig(sparsity=0.6, level=level))
    weights, masks = weights_of(model, ticket), masks_of(ticket)
    groups = [[name] for name in weights] if level == "layer" else [list(weights)]
    for group in groups:
        values = torch.cat([weights[name].flatten().double().abs() for name in group])
        kept = torch.cat([masks[name].flatten() for name in group])
        assert kept.sum() == len(values) - round(0.6 * len(values))
        assert values[kept].min() >= values[~kept].max()
    assert ticket.masks.keys() == {f"{i}.weight" for i in (0, 3, 4, 6, 8)}


def test_random_tickets():
    model, _ = network("bert")
    for level in ("global", "layer"):
        first, same, other = (
            draw_ticket(model, TicketConfig(scheme="random", sparsity=0.75, level=level, seed=seed))
            for seed in (1, 1, 2)
        )
        assert first == same != other
        total = sum(layer.size for layer in first.layers)
        assert sum(layer.kept for layer in first.layers) == total - round(0.75 * total)
        assert 0.1 < first.overlap(other) < 0.19  # 1/16 of 7/16
        for layer in first.layers:
            bound = 5 * (0.25 * 0.75 / layer.size) ** 0.5
            assert abs(layer.sparsity - 0.75) < (1e-9 if level == "layer" else bound)
        masks = torch.cat([m.flatten() for m in masks_of(first).values()])
        weights = torch.cat([w.flatten().abs() for w in weights_of(model, first).values()])
        assert weights[masks].mean() < 1.1 * weights.mean()  # no preference for the large
    state = torch.get_rng_state()
    draw_ticket(model, TicketConfig(scheme="random", sparsity=0.5))
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_pruned_and_layers_that_would_be_empty():
    model, _ = network("bert")
    for scheme in ("magnitude", "random"):
        ticket = draw_ticket(model, TicketConfig(scheme=scheme, sparsity=0.0))
        assert ticket.sparsity == 0 and all(m.all() for m in masks_of(ticket).values())
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(1e-3)
        model.bert.pooler.dense.weight.mul_(1e-3)
    names = "encoder.layer.1.output.dense.weight, pooler.dense.weight: "
    with pytest.raises(ValueError, match=f"at a sparsity of 0.7 no .* survives in {names}"):
        draw_ticket(model, TicketConfig(sparsity=0.7))
    draw_ticket(model, TicketConfig(sparsity=0.7, level="layer"))
    with pytest.raises(ValueError, match="no weight at all survives in 0.weight"):
        draw_ticket(nn.Sequential(nn.Linear(2, 2)), TicketConfig(sparsity=0.95, level="layer"))


def test_what_is_refused():
    model, config = bert(), TicketConfig(sparsity=0.5)
    iterative = TicketConfig(scheme="iterative", sparsity=0.5)
    with pytest.raises(TypeError, match="memtl.TicketConfig"):
        draw_ticket(model, {"sparsity": 0.5})
    with pytest.raises(TypeError, match="needs train, a function, got None"):
        draw_ticket(model, iterative)
    for options in ({"train": print}, {"directory": "x"}):
        with pytest.raises(ValueError, match="of the schemes .*'iterative'.*, not 'magnitude'"):
            draw_ticket(model, config, **options)
    for value in (torch.nan, -torch.inf):
        with torch.no_grad():
            model.bert.encoder.layer[1].attention.self.key.weight[3, 4] = value
        for some in (config, TicketConfig(scheme="random", sparsity=0.5)):
            with pytest.raises(ValueError, match="^encoder.layer.1.*key.weight holds .*not finite"):
                draw_ticket(model, some)
    for some in (config, TicketConfig(scheme="random", sparsity=0.5)):
        with pytest.raises(ValueError, match="^encoder.*query.weight is on the meta device"):
            draw_ticket(bert().to("meta"), some)


# round after round


class Training:
    """Trains a model for some steps, the same in every call for the same round; notes the model at
    the beginning of each round, and stops before the round ``until``."""

    def __init__(self, steps: int = 3, until: int | None = None, rate: float = 0.05):
        self.steps, self.until, self.rate = steps, until, rate
        self.starts: dict[int, dict[str, torch.Tensor]] = {}
        self.ends: dict[int, dict[str, torch.Tensor]] = {}
        self.after: list[dict[str, torch.Tensor]] = []
        self.masked: dict[int, Ticket | None] = {}

    def __call__(self, model, round, on_step):
        if round == self.until:
            raise KeyboardInterrupt
        self.starts[round] = copied(model)
        self.masked[round] = Ticket.of(model) if pruned(model) else None
        assert not model.training and all(p.grad is None for p in model.parameters())
        generator = torch.Generator().manual_seed(round)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), self.rate, momentum=0.9)
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            loss(model, torch.randint(0, 40, (4, 6), generator=generator)).backward()
            optimizer.step()
            on_step(step)
            self.after.append(copied(model))
        self.ends[round] = copied(model)


def copied(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert_same(t, theirs[name])


ITERATIVE = {"scheme": "iterative", "sparsity": 0.35}


@pytest.mark.parametrize(
    "options",
    [{}, {"head": "reset"}, {"rewind_step": 2}, {"rewind_step": 2, "head": "reset"}],
    ids=str,
)
def test_every_round_starts_where_the_first_one_did(options):
    """A rewinding that kept references instead of copies would start where training ended."""
    model = bert().eval()
    before = copied(model)
    training = Training()
    ticket = draw_ticket(model, TicketConfig(**ITERATIVE, **options), train=training)
    assert_same_state(copied(model), before)
    assert_same_state(training.starts[1], before)
    assert training.masked[1] is None and list(training.starts) == [1, 2, 3, 4]
    assert not torch.equal(training.ends[1]["classifier.weight"], before["classifier.weight"])
    origin = training.after[1] if "rewind_step" in options else before
    for round in (2, 3, 4):
        masks = masks_of(training.masked[round])
        expected = dict(origin)
        if "head" not in options:
            kept = training.ends[round - 1]
            expected |= {name: kept[name] for name in ("classifier.weight", "classifier.bias")}
        for name, mask in masks.items():
            expected[f"bert.{name}"] = expected[f"bert.{name}"] * mask
        assert_same_state(training.starts[round], expected)
    assert ticket.source.round == 4


def test_weights_of_several_dtypes():
    model, _ = network("bert")
    expected = draw_ticket(model, TicketConfig(sparsity=0.6))
    model.bert.pooler.double()
    assert draw_ticket(model, TicketConfig(sparsity=0.6)) == expected


@pytest.mark.parametrize("level", ["global", "layer"])
def test_rounds_prune_the_smallest_of_what_is_left(level):
    model = bert().eval()
    training = Training()
    config = TicketConfig(**ITERATIVE, level=level)
    final = draw_ticket(model, config, train=training)
    tickets = [*(training.masked[r] for r in (2, 3, 4)), final]
    before = {name: torch.ones(shape, dtype=torch.bool) for name, shape in final.shapes.items()}
    for number, (ticket, sparsity) in enumerate(zip(tickets, config.rounds(), strict=True), 1):
        assert ticket.source.round == number and ticket.source.scheme == "iterative"
        after = masks_of(ticket)
        groups = [[name] for name in after] if level == "layer" else [list(after)]
        for group in groups:
            kept = torch.cat([after[name].flatten() for name in group])
            left = torch.cat([before[name].flatten() for name in group])
            trained = [training.ends[number][f"bert.{name}"].flatten().abs() for name in group]
            values = torch.cat(trained)
            assert (left | ~kept).all()
            assert kept.sum() == len(kept) - round(sparsity * len(kept))
            assert values[kept].min() >= values[left & ~kept].max()
        before = after
    one_shot = draw_ticket(model, TicketConfig(sparsity=0.35, level=level))
    assert final != one_shot and one_shot.source.fingerprint == final.source.fingerprint


def test_the_model_is_left_as_it_was_whatever_happens():
    model = bert()
    model.train().bert.encoder.layer[0].eval()
    model.bert.embeddings.requires_grad_(False)
    model.classifier.bias.grad = grad = torch.randn(2)
    before, given = copied(model), grad.clone()

    def check():
        assert_same_state(copied(model), before)
        assert not pruned(model) and type(model.bert.pooler.dense) is nn.Linear
        assert model.training and not model.bert.encoder.layer[0].training
        assert not model.bert.embeddings.word_embeddings.weight.requires_grad
        assert model.classifier.bias.grad is grad and torch.equal(grad, given)
        others = [p for p in model.parameters() if p is not model.classifier.bias]
        assert all(p.grad is None for p in others)
        assert not hasattr(model, "memtl_ticket")

    def fails(model, round, on_step):
        model.eval().requires_grad_(True)
        loss(model, words()).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        if round == 2:
            assert pruned(model)
            raise RuntimeError("no more")

    config = TicketConfig(**ITERATIVE)
    with pytest.raises(RuntimeError, match="no more"):
        draw_ticket(model, config, train=fails)
    check()

    def diverges(model, round, on_step):
        with torch.no_grad():
            model.bert.pooler.dense.weight[0, 0] = torch.nan

    with pytest.raises(ValueError, match="pooler.dense.weight holds .* not finite after round 1"):
        draw_ticket(model, config, train=diverges)
    check()

    def moves(model, round, on_step):
        model.double()
        model.bert.encoder.layer[1].train(False)

    draw_ticket(model, config, train=moves)
    check()
    draw_ticket(model, TicketConfig(sparsity=0.5))
    check()


def test_a_rewinding_step_that_is_never_reached():
    config = TicketConfig(**ITERATIVE, rewind_step=10)
    with pytest.raises(ValueError, match="rewind_step is 10, but train called on_step last with 3"):
        draw_ticket(bert().eval(), config, train=Training(3))


def test_parameters_that_training_adds_or_takes_away():
    def adds(model, round, on_step):
        model.more = nn.Linear(2, 2)

    def renames(model, round, on_step):
        model[0] = nn.Sequential(model[0])

    config = TicketConfig(**ITERATIVE)
    for train, name in ((adds, "more.bias"), (renames, "0.0.bias")):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        weight = model[1].weight.detach().clone()
        with pytest.raises(ValueError, match=f"may not add or take away parameters, as {name}"):
            draw_ticket(model, config, train=train)
        assert_same(model[1].weight.detach(), weight)


def test_running_statistics_go_back_too():
    model, x = network("convs")
    model.train()
    seen = []

    def train(model, round, on_step):
        seen.append(copied(model))
        loss(model, x * round).backward()

    draw_ticket(model, TicketConfig(**ITERATIVE), train=train)
    for state in seen[1:]:
        for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            assert_same(state[name], seen[0][name])


# on disk


@pytest.mark.parametrize("options", [{}, {"head": "reset", "rewind_step": 2}, {"rewind_step": 1}])
def test_an_interrupted_draw_goes_on(tmp_path, options):
    config = TicketConfig(**ITERATIVE, **options)
    model = bert().eval()
    whole = Training()
    expected = draw_ticket(model, config, train=whole)
    for until in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            draw_ticket(model, config, train=Training(until=until), directory=tmp_path / "x")
    again = copy.deepcopy(model)
    with torch.no_grad():  # another head: the first one counts
        again.classifier.weight.normal_()
    head = again.classifier.weight.detach().clone()
    rest = Training()
    ticket = draw_ticket(again, config, train=rest, directory=tmp_path / "x", task="resumed")
    assert ticket == expected and list(rest.starts) == [4]
    assert_same_state(rest.starts[4], whole.starts[4])
    assert_same_state(rest.ends[4], whole.ends[4])
    assert_same(again.classifier.weight.detach(), head)
    for round in range(1, 5):
        kept = Ticket.load(tmp_path / "x" / f"round-0{round}.safetensors")
        assert kept.source.round == round and kept.config == config
        if round < 4:
            assert kept == whole.masked[round + 1]
    assert kept == expected

    def never(model, round, on_step):
        raise AssertionError

    assert draw_ticket(model, config, train=never, directory=tmp_path / "x") == expected


def test_another_draw_in_the_directory(tmp_path):
    config = TicketConfig(**ITERATIVE)
    model = bert().eval()
    with pytest.raises(KeyboardInterrupt):
        draw_ticket(model, config, train=Training(until=2), directory=tmp_path)
    other = TicketConfig(scheme="iterative", sparsity=0.5, head="reset")
    with pytest.raises(ValueError, match=r"sparsity was 0.35, is 0.5; head was 'kept', is 'reset'"):
        draw_ticket(model, other, train=Training(), directory=tmp_path)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.bert.embeddings.LayerNorm.bias[0] += 1e-3
    with pytest.raises(ValueError, match="from a backbone with other weights"):
        draw_ticket(changed, config, train=Training(), directory=tmp_path)
    wider = small.bert(num_labels=3)
    wider.bert.load_state_dict(model.bert.state_dict())
    with pytest.raises(ValueError, match="start.safetensors is of a model with another head"):
        draw_ticket(wider, config, train=Training(), directory=tmp_path)
    assert draw_ticket(model, config, train=Training(), directory=tmp_path).source.round == 4
    (tmp_path / "draw.json").rename(tmp_path / "draw.old")
    with pytest.raises(ValueError, match=r"has rounds of a ticket, but no draw.json"):
        draw_ticket(model, config, train=Training(), directory=tmp_path)


def test_an_iterative_draw_goes_further_and_less_far(tmp_path):
    """As long as the rounds are the same; the model trains no round again."""
    model = bert().eval()
    near, far = (
        TicketConfig(scheme="iterative", sparsity=s, of="remaining") for s in (0.19, 0.271)
    )
    expected = draw_ticket(model, far, train=Training())
    first = draw_ticket(model, near, train=Training(), directory=tmp_path)
    assert first.source.round == 2

    def rest(model, round, on_step):
        assert round == 3
        return Training()(model, round, on_step)

    assert draw_ticket(model, far, train=rest, directory=tmp_path) == expected
    assert draw_ticket(model, near, train=rest, directory=tmp_path) == first
    assert draw_ticket(model, far, train=rest, directory=tmp_path) == expected
    for other in (0.18, 0.26):  # whose last round is none of those
        config = dataclasses.replace(far, sparsity=other)
        with pytest.raises(ValueError, match=f"sparsity was 0.271, is {other}"):
            draw_ticket(model, config, train=rest, directory=tmp_path)


def test_one_draw_at_a_time_in_a_directory(tmp_path):
    config, model = TicketConfig(**ITERATIVE), bert().eval()

    def train(model, round, on_step):
        with pytest.raises(ValueError, match=f"another draw is at work in {tmp_path}"):
            draw_ticket(bert(), config, train=Training(), directory=tmp_path)

    ticket = draw_ticket(model, config, train=train, directory=tmp_path)
    assert draw_ticket(model, config, train=train, directory=tmp_path) == ticket


@pytest.mark.parametrize(
    "name", ["draw.json", "start.safetensors", "head-02.safetensors", "round-02.safetensors",
             "origin.safetensors"]
)  # fmt: skip
def test_a_damaged_directory(tmp_path, name):
    config = TicketConfig(**ITERATIVE, rewind_step=1)
    model = bert().eval()
    with pytest.raises(KeyboardInterrupt):
        draw_ticket(model, config, train=Training(until=3), directory=tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    at = len(content) - 3
    for broken in (content[:-5], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]):
        if name == "draw.json" and broken[-5:] == content[-5:]:
            continue
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=name):
            draw_ticket(model, config, train=Training(), directory=tmp_path)
    if name != "draw.json":
        return
    path.write_bytes(content)
    assert draw_ticket(model, config, train=Training(), directory=tmp_path).source.round == 4


def test_the_whole_way(tmp_path):
    """As in the README: drawn on one task, used on another."""
    source, target = bert("ForMaskedLM").eval(), bert().eval()
    target.bert.load_state_dict(source.bert.state_dict(), strict=False)
    config = TicketConfig(scheme="iterative", sparsity=0.7, amount=0.35)
    ticket = draw_ticket(source, config, train=Training(1), directory=tmp_path / "runs")
    ticket.save(tmp_path / "t.safetensors")
    memtl.Ticket.load(tmp_path / "t.safetensors").apply(target)
    for name, (weight, where) in pruned(target).items():
        stock = source.get_parameter(name).detach()
        assert_same(weight.detach(), stock.masked_fill(where, 0))
