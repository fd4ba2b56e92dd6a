"""Patterns: rows, kernels, channels and N of M, against their definition, group by group."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memtl import Ticket, TicketConfig, draw_ticket
from memtl.methods.tickets import saved
from memtl.methods.tickets.patterns import GROUPED, Layout, pattern_masks
from memtl.reference.bits import bits_pack, bits_unpack
from tests.methods.tickets.small import assert_zero, convs

Group = list[tuple[int, ...]]
"""Places of a weight."""


class Projected(nn.Module):
    """Attention beside transformers' Conv1D, [I, O]; the name of each weight says no layout."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = Conv1D(12, 8)  # [8, 12]

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.attention(x, x, x, need_weights=False)[0])


NETWORKS = {
    "conv2d": lambda: nn.Sequential(nn.Conv2d(4, 7, 3), nn.Conv2d(8, 6, (2, 5), groups=2)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(7, 14, 3, groups=7), nn.Conv2d(14, 5, 1)),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.Linear(4, 9)),
    "conv3d": lambda: nn.Sequential(nn.Conv3d(4, 3, (2, 3, 2)), nn.Conv2d(4, 3, 2)),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 5, 3), nn.ConvTranspose2d(8, 6, (3, 2), groups=2)
    ),
    "projected": Projected,
}


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network of small whole numbers, of which many are equal in magnitude, and none is zero: no
    mean is rounded, whatever the dtype."""
    model = NETWORKS[name]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(1, 5, p.shape) * (2 * torch.randint(0, 2, p.shape) - 1))
    return model


def weights_of(model: nn.Module) -> dict[str, tuple[Tensor, str, int]]:
    """Every matrix with the order of its channels, and its groups."""
    found = {}
    for name, module in model.named_modules():
        transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
        order = "IO" if transposed or type(module).__name__ == "Conv1D" else "OI"
        for key in ("weight", "in_proj_weight"):
            if isinstance(weight := getattr(module, key, None), Tensor):
                number = module.groups if order == "IO" and transposed else 1
                found[f"{name}.{key}"] = weight.detach(), order, number
    return found


def groups_of(shape: tuple[int, ...], order: str, number: int, pattern: str) -> list[Group]:
    """The places of a weight, of one group each, by going through all of them; groups are in the
    order of their first places."""
    found: dict[tuple, Group] = {}
    for place in itertools.product(*map(range, shape)):
        a, b, *kernel = place
        out = (a,) if order == "OI" else (a // (shape[0] // number), b)
        within = b if order == "OI" else a
        key = {
            "channel": (out,),
            "kernel": (out, within, *([] if kernel else ["alone"])),
            "row": (out, within, *kernel[:-1]),
        }[pattern]
        found.setdefault(key, []).append(place)
    return list(found.values())


def expected_masks(
    weights: dict[str, tuple[Tensor, str, int]],
    sparsity: float,
    pattern: str,
    given: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The definition, of all weights together: the lowest means fall while the elements last."""
    ranked = []
    for number, (name, (weight, *layout)) in enumerate(weights.items()):
        for index, group in enumerate(groups_of(tuple(weight.shape), *layout, pattern)):
            mean = sum(abs(float(weight[place])) for place in group) / len(group)
            if given is not None and not given[name][group[0]]:
                mean = -1.0
            ranked.append((mean, -number, -index, name, group))
    ranked.sort(key=lambda entry: entry[:3])  # of equal ones the last fall first
    masks = {name: torch.ones(w.shape, dtype=torch.bool) for name, (w, *_) in weights.items()}
    budget = round(sparsity * sum(m.numel() for m in masks.values()))
    for *_, name, group in ranked:
        budget -= len(group)
        if budget < 0:
            break
        for place in group:
            masks[name][place] = False
    return masks


def masks_of(ticket: Ticket) -> dict[str, Tensor]:
    shapes = {name: torch.Size(shape) for name, shape in ticket.shapes.items()}
    return {n: bits_unpack(b, shapes[n].numel()).view(shapes[n]) for n, b in ticket.masks.items()}


def assert_masks(ticket: Ticket, expected: dict[str, Tensor]) -> None:
    """Of weights; what goes with a pruned channel besides has tests of its own."""
    assert [layer.name for layer in ticket.layers] == list(expected)
    for name, mask in expected.items():
        assert torch.equal(ticket.masks[name], bits_pack(mask)), name


def assert_whole(ticket: Ticket, model: nn.Module, pattern: str) -> None:
    """Groups are kept or pruned whole."""
    for name, (weight, *layout) in weights_of(model).items():
        mask = masks_of(ticket)[name]
        for group in groups_of(tuple(weight.shape), *layout, pattern):
            assert len({bool(mask[place]) for place in group}) == 1, (name, group)


# at once


@pytest.mark.parametrize("level", ["global", "layer"])
@pytest.mark.parametrize("pattern", GROUPED)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_largest_groups_survive(name, pattern, level):
    model = made(name)
    for sparsity in (0.0, 0.3, 0.6):
        config = TicketConfig(sparsity=sparsity, pattern=pattern, level=level)
        ticket = draw_ticket(model, config)
        weights = weights_of(model)
        together = [list(weights)] if level == "global" else [[n] for n in weights]
        expected = {}
        for names in together:
            expected |= expected_masks({n: weights[n] for n in names}, sparsity, pattern)
        assert_masks(ticket, expected)
        asked = sum(round(sparsity * sum(weights[n][0].numel() for n in ns)) for ns in together)
        got = sum(layer.size - layer.kept for layer in ticket.layers)
        largest = max(
            len(group)
            for weight, *layout in weights.values()
            for group in groups_of(tuple(weight.shape), *layout, pattern)
        )
        assert 0 <= asked - got < largest * len(together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [*GROUPED, "2:4"])
def test_other_types(pattern, dtype):
    """Numbers are whole: the masks are those of float64; a sum of float16 would overflow."""
    model = made("conv2d")
    with torch.no_grad():
        model[0].weight.mul_(8192)
    config = TicketConfig(sparsity=0.5, pattern=pattern, level="layer")
    expected = draw_ticket(model, config)
    model[0].weight.data = model[0].weight.data.transpose(2, 3).contiguous().transpose(2, 3)
    model[1].to(memory_format=torch.channels_last)
    assert draw_ticket(model, config) == expected
    assert draw_ticket(model.to(dtype), config) == expected
    model[0].double()  # of several types
    assert draw_ticket(model, config) == expected


def test_of_linear_layers_rows_and_kernels_are_single_weights():
    model = nn.Sequential(nn.Linear(33, 21), nn.Linear(21, 7), nn.Conv2d(7, 5, 1))
    for level in ("global", "layer"):
        unstructured = draw_ticket(model, TicketConfig(sparsity=0.63, level=level))
        for pattern in ("row", "kernel"):
            config = TicketConfig(sparsity=0.63, level=level, pattern=pattern)
            assert draw_ticket(model, config) == unstructured


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "3:4"])
@pytest.mark.parametrize("name", ["conv2d", "conv1d", "conv3d", "transposed", "projected"])
def test_n_of_every_m(name, pattern):
    """Of M inputs in a row the N largest, of equal ones the first; at every place of a kernel."""
    n, m = map(int, pattern.split(":"))
    model = made(name)
    for level in ("global", "layer"):
        config = TicketConfig(sparsity=1 - n / m, pattern=pattern, level=level)
        ticket = draw_ticket(model, config)
        expected = {}
        for key, (weight, order, _) in weights_of(model).items():
            by_input = weight if order == "OI" else weight.transpose(0, 1)
            mask = torch.zeros_like(by_input, dtype=torch.bool)
            first, inputs, *kernel = by_input.shape
            for o, i, *k in itertools.product(
                range(first), range(0, inputs, m), *map(range, kernel)
            ):
                block = [(abs(float(by_input[(o, j, *k)])), -j) for j in range(i, i + m)]
                for _, j in sorted(block, reverse=True)[:n]:
                    mask[(o, -j, *k)] = True
            expected[key] = mask if order == "OI" else mask.transpose(0, 1)
        assert_masks(ticket, expected)
        assert ticket.sparsity == 1 - n / m


def test_of_equal_groups_the_first_survive():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))
    for layer in model:
        nn.init.constant_(layer.weight, -0.5)
    ticket = draw_ticket(model, TicketConfig(sparsity=0.4, pattern="channel"))
    kept = [masks_of(ticket)[f"{i}.weight"].flatten(1).all(1).tolist() for i in (0, 1)]
    # 432 weights, 173 to prune: channels of 54, then of 36, from behind
    assert kept == [[True] * 6, [True] + [False] * 3]
    both = draw_ticket(model, TicketConfig(sparsity=0.4, pattern="channel", level="layer"))
    kept = [masks_of(both)[f"{i}.weight"].flatten(1).all(1).tolist() for i in (0, 1)]
    assert kept == [[True] * 4 + [False] * 2, [True] * 3 + [False]]
    half = draw_ticket(model[:1], TicketConfig(sparsity=0.5, pattern="2:4"))
    assert masks_of(half)["0.weight"][0, :, 0, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("level", ["global", "layer"])
def test_random_groups(level):
    model = nn.Sequential(nn.Conv2d(4, 60, 3), nn.Conv2d(60, 40, 3), nn.ConvTranspose2d(40, 48, 2))
    for pattern in GROUPED:
        options = dict(scheme="random", sparsity=0.5, pattern=pattern, level=level)
        first, same, other = (
            draw_ticket(model, TicketConfig(**options, seed=s)) for s in (1, 1, 2)
        )
        assert first == same != other
        assert 0.5 - 540 / 31_440 < first.sparsity <= 0.5  # a channel of the second has 540
        for layer in first.layers:
            assert 0.2 < layer.sparsity < 0.8, (pattern, layer)  # groups of any size alike
        shown = masks_of(first)["1.weight"]
        dims = {"row": (-1,), "kernel": (2, 3), "channel": (1, 2, 3)}[pattern]
        assert (shown.amax(dims) == shown.amin(dims)).all()
    half = [TicketConfig(scheme="random", sparsity=0.5, pattern="2:4", seed=s) for s in (1, 2)]
    first, other = (draw_ticket(model, config) for config in half)
    assert first != other
    blocks = masks_of(first)["1.weight"].unflatten(1, (-1, 4))
    assert (blocks.sum(2) == 2).all()
    assert blocks.float().mean((0, 1, 3, 4)).sub(0.5).abs().max() < 0.05  # any of the four


def test_survivors_of_given_masks_and_signs():
    scores = [torch.randn(6, 4, 3, 3), torch.randn(5, 8)]
    layouts = [Layout.of(s.shape) for s in scores]
    for pattern in (*GROUPED, "1:4"):
        before = pattern_masks(scores, layouts, 0.4, pattern, "global")
        others = [torch.randn_like(s) for s in scores]
        after = pattern_masks(others, layouts, 0.7, pattern, "global", before)
        assert all(torch.equal(a & b, a) for a, b in zip(after, before, strict=True))
        same = pattern_masks([-s.abs() for s in others], layouts, 0.7, pattern, "global", before)
        assert all(map(torch.equal, after, same))
        if pattern in GROUPED:  # fewer to prune than are: nothing comes back
            assert all(
                map(
                    torch.equal,
                    before,
                    pattern_masks(others, layouts, 0.1, pattern, "global", before),
                )
            )


# round after round


class Toy:
    """Puts other numbers into the surviving weights of each round, and stops before ``until``."""

    def __init__(self, until: int | None = None):
        self.until = until
        self.trained: dict[int, dict[str, tuple[Tensor, str, int]]] = {}
        self.before: dict[int, Ticket] = {}

    def __call__(self, model: nn.Module, round: int, on_step) -> None:
        if round == self.until:
            raise KeyboardInterrupt
        if round > 1:
            self.before[round] = Ticket.of(model)
        generator = torch.Generator().manual_seed(round)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(torch.randint(1, 5, p.shape, generator=generator))
        self.trained[round] = {n: (w.clone(), *how) for n, (w, *how) in weights_of(model).items()}


@pytest.mark.parametrize("pattern", GROUPED)
@pytest.mark.parametrize("name", ["conv2d", "transposed"])
def test_rounds_prune_among_the_groups_that_are_left(name, pattern):
    model = made(name)
    train = Toy()
    config = TicketConfig(scheme="iterative", sparsity=0.6, amount=0.2, pattern=pattern)
    final = draw_ticket(model, config, train=train)
    given = None
    for round, sparsity in enumerate(config.rounds(), 1):
        given = expected_masks(train.trained[round], sparsity, pattern, given)
        ticket = final if round == 3 else train.before[round + 1]
        assert_masks(ticket, given)
        assert ticket.source.round == round and ticket.transposed == final.transposed
    assert final.transposed == ({"0.weight": 1, "1.weight": 2} if name == "transposed" else {})


def test_n_of_m_has_one_round(tmp_path):
    model = made("conv2d")
    train = Toy()
    config = TicketConfig(scheme="iterative", sparsity=0.5, pattern="2:4")
    assert config.rounds() == (0.5,)
    ticket = draw_ticket(model, config, train=train, directory=tmp_path)
    assert list(train.trained) == [1] and ticket.source.round == 1
    with torch.no_grad():
        for name, (weight, *_) in train.trained[1].items():
            model.get_parameter(name).copy_(weight)
    assert ticket == draw_ticket(model, dataclasses.replace(config, scheme="magnitude"))


@pytest.mark.parametrize("pattern", ["channel", "row"])
def test_an_interrupted_draw_goes_on(tmp_path, pattern):
    model = made("transposed")
    config = TicketConfig(scheme="iterative", sparsity=0.5, amount=0.2, pattern=pattern)
    expected = draw_ticket(model, config, train=Toy())
    with pytest.raises(KeyboardInterrupt):
        draw_ticket(model, config, train=Toy(until=3), directory=tmp_path)
    rest = Toy()
    ticket = draw_ticket(model, config, train=rest, directory=tmp_path)
    assert ticket == expected and list(rest.trained) == [3]
    assert ticket.transposed == Ticket.load(tmp_path / "round-03.safetensors").transposed != {}
    other = dataclasses.replace(config, pattern="kernel")
    with pytest.raises(ValueError, match=f"pattern was '{pattern}', is 'kernel'"):
        draw_ticket(model, other, train=Toy(), directory=tmp_path)


def test_a_draw_from_before_there_were_patterns_goes_on(tmp_path):
    model = made("conv2d")
    config = TicketConfig(scheme="iterative", sparsity=0.3)
    expected = draw_ticket(model, config, train=Toy(), directory=tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        draw_ticket(model, config, train=Toy(until=2), directory=tmp_path / "old")
    path = tmp_path / "old" / "draw.json"
    record = json.loads(path.read_text())
    assert record["config"].pop("pattern") == "unstructured"
    path.write_text(json.dumps(record))
    rest = Toy()
    assert draw_ticket(model, config, train=rest, directory=tmp_path / "old") == expected
    assert list(rest.trained) == [2, 3]


# the ticket


@pytest.mark.parametrize("pattern", [*GROUPED, "1:2"])
@pytest.mark.parametrize("name", ["conv2d", "transposed", "projected"])
def test_a_file_a_model_and_a_control_have_the_pattern(tmp_path, name, pattern):
    model = made(name)
    ticket = draw_ticket(model, TicketConfig(sparsity=0.5, pattern=pattern))
    assert str(ticket).startswith(f"magnitude {pattern} ticket, round 1: ")
    loaded = Ticket.load(ticket.save(tmp_path / "t.safetensors"))
    loaded.apply(model)
    applied = Ticket.of(model)
    control = ticket.shuffled(1)
    for same in (loaded, applied, control):
        assert same.config == ticket.config and same.transposed == ticket.transposed
    assert ticket == loaded == applied != control
    assert control == loaded.shuffled(1) == applied.shuffled(1) != ticket.shuffled(2)
    assert control.source.scheme == "magnitude, shuffled by 1"
    assert [layer.kept for layer in control.layers] == [layer.kept for layer in ticket.layers]
    if pattern in GROUPED:
        assert_whole(control, model, pattern)
        return
    for key, (_, order, _) in weights_of(model).items():
        mask = masks_of(control)[key]
        blocks = mask.unflatten(dim := order.index("I"), (-1, 2))
        assert (blocks.sum(dim + 1) == 1).all()


def test_files_without_the_field(tmp_path):
    model = made("conv2d")
    ticket = draw_ticket(model, TicketConfig(sparsity=0.5))
    path = ticket.save(tmp_path / "t.safetensors")
    with safe_open(str(path), "pt") as file:
        record = json.loads(file.metadata()[saved.KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    del record["config"]["pattern"], record["transposed"], record["sha256"]
    record["sha256"] = saved._digest(record, tensors)
    save_file(tensors, str(path), {saved.KEY: json.dumps(record)})
    old = Ticket.load(path)
    assert old == ticket and old.config == ticket.config and old.transposed == {}
    assert str(old).startswith("magnitude ticket, round 1: ")
    assert old.shuffled(3) == ticket.shuffled(3)
    for groups in (3, 0):
        with pytest.raises(ValueError, match=f"0.weight cannot be transposed in {groups} groups"):
            dataclasses.replace(ticket, transposed={"0.weight": groups})


def test_training_under_a_pattern():
    model, x = convs(), torch.randn(4, 3, 8, 8)
    layers = ("0.weight", "4.weight", "6.weight", "8.weight")
    config = TicketConfig(sparsity=0.4, pattern="channel", level="layer", scope=layers)
    draw_ticket(model, config).apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert_zero(model)
    where = model[4].weight.detach().abs().amax((0, 2, 3)) == 0
    assert where.tolist().count(True) == 2  # of the five outputs of [7, 5, 2, 2]


def test_linear_layers_run_sparse_by_what_survives():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    few = draw_ticket(model, TicketConfig(sparsity=0.9, pattern="channel", level="layer"))
    half = draw_ticket(model, TicketConfig(sparsity=0.5, pattern="2:4"))
    x = torch.randn(300, 64)
    for ticket, sparse in ((few, ("0.weight", "1.weight")), (half, ())):
        dense = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
        dense.load_state_dict(model.state_dict())
        ticket.apply(dense, sparse=False)
        expected = dense(x)
        assert ticket.apply(model).sparse == sparse
        torch.testing.assert_close(model(x), expected)
        ticket.remove(model)
        model.load_state_dict(dense.state_dict())


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "block"},
            "pattern must be one of .*'channel'.* or 'N:M' .*'2:4', got 'block'",
        ),
        ({"pattern": None}, "pattern must be one of .*, got None"),
        ({"pattern": ("2:4",)}, "pattern must be one of"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"pattern": "5:4"}, "0 < N < M"),
        ({"pattern": "0:4"}, "0 < N < M"),
        ({"pattern": "2:4 "}, "0 < N < M"),
        ({"pattern": "2:4", "sparsity": 0.6}, "'2:4' has a sparsity of 1 - 2/4 = 0.5.*got 0.6"),
        ({"pattern": "1:3", "sparsity": 0.667}, "1 - 1/3 = 0.666667"),
    ],
    ids=str,
)
def test_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        TicketConfig(**({"sparsity": 0.5} | options))


def test_configurations_go_through_json():
    for pattern, sparsity in (("channel", 0.3), ("1:3", 2 / 3), ("1:3", 0.6666666666)):
        config = TicketConfig(sparsity=sparsity, pattern=pattern)
        assert TicketConfig.from_json(config.to_json()) == config


def test_inputs_that_are_not_divisible():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1))
    config = TicketConfig(sparsity=0.5, pattern="2:4")
    message = "'2:4' needs .* divisible by 4, but 0.weight has 3, 1.weight has 1: scope can leave"
    with pytest.raises(ValueError, match=message):
        draw_ticket(model, config)

    def never(*args):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        draw_ticket(model, dataclasses.replace(config, scheme="iterative"), train=never)
    ticket = draw_ticket(model, dataclasses.replace(config, scope=("2.*",)))
    assert list(ticket.masks) == ["2.weight"] and ticket.sparsity == 0.5


def test_weights_whose_channels_are_not_known():
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "rnn": nn.LSTM(4, 4)})
    config = TicketConfig(sparsity=0.5, pattern="channel", scope=("*",))
    message = "'channel' is of .*, but others read rnn.weight_ih_l0, rnn.weight_hh_l0, or two"
    with pytest.raises(ValueError, match=message):
        draw_ticket(model, config)
    draw_ticket(model, dataclasses.replace(config, scope=None))
    draw_ticket(model, dataclasses.replace(config, pattern="unstructured"))
    tied = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="others read 0.weight, or two read it differently"):
        draw_ticket(tied, TicketConfig(sparsity=0.5, pattern="channel"))


def test_layers_that_would_be_empty():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    config = TicketConfig(sparsity=0.6, pattern="channel")
    with pytest.raises(ValueError, match="no weight at all survives in 1.weight: prune less, or"):
        draw_ticket(model, config)
    draw_ticket(model, dataclasses.replace(config, level="layer"))
