"""Adding up what is alive."""

import torch
from torch import nn

from memtl.estimate import fake
from memtl.estimate.live import Live


def test_births_and_ends():
    with Live() as live:
        x = torch.ones(1000)
        view = x[10:]
        y = x * 2
        assert live.now == 8000
        del x, y
        assert live.now == 4000  # the view keeps it
        del view
        assert live.now == 0
    assert live.peak == 8000


def test_what_was_there_before_is_counted_once():
    x = torch.ones(100)
    with Live([x, x[1:]]) as live:
        x.add_(1)
    assert live.now == live.peak == 400


def test_memory_that_nobody_wrote_to():
    with Live() as live:
        x = torch.empty(1000)
        assert live.now == 0
        x.fill_(1)
        assert live.now == 4000
        y = torch.empty_like(x)
        del y
    assert live.peak == 4000
    other = Live(device="cuda")
    assert other.now == 0


def test_gradients_that_the_engine_adds_in_place():
    n = 4096
    x = torch.ones(n, requires_grad=True)
    a = x * 1.0
    loss = ((a * 2) + (a * 3)).sum()
    with Live([x, a]) as live:
        loss.backward()
    # Beside x and a two gradients of a, never a third for their sum.
    assert 4 * n * 4 <= live.peak <= 4 * n * 4 + 64


def test_a_model_of_any_size_takes_no_memory():
    mode = fake.mode()
    model = fake.build(
        lambda: nn.Sequential(*(nn.Linear(2**16, 2**16) for _ in range(100))), lambda m: None,
        mode, "cpu",
    )  # fmt: skip
    assert sum(p.nbytes for p in model.parameters()) > 1.7e12
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_tied_and_frozen_parameters_stay_so():
    def make():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        model[1].weight = model[0].weight
        model[0].bias.requires_grad_(False)
        return model

    model = fake.build(make, lambda m: None, fake.mode(), "cpu")
    assert model[0].weight is model[1].weight
    assert not model[0].bias.requires_grad and model[1].bias.requires_grad
    assert model[2].running_mean.device.type == "cpu"


def test_a_constructor_that_reads_numbers():
    def make():
        rates = [x.item() for x in torch.linspace(0, 1, 3)]
        return nn.Sequential(*(nn.Dropout(rate) for rate in rates), nn.Linear(2, 2))

    model = fake.build(make, lambda m: None, fake.mode(), "cpu")
    assert [layer.p for layer in model[:3]] == [0, 0.5, 1]
