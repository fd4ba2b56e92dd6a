import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from memtl.tasks import Split, Task
from memtl.training import History, Settings, Step, evaluate, fit, score


def blobs(n: int) -> Split:
    """Three classes of small images, each bright in a row of its own."""
    labels = torch.arange(n) % 3
    images = 0.5 * torch.randn(n, 1, 3, 3)
    images[torch.arange(n), 0, labels] += 2
    return Split(images, labels)


def network(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(9, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(settings: Settings, split: Split, dropout: float = 0.0) -> tuple[nn.Module, History]:
    torch.manual_seed(5)
    model = network(dropout)
    return model, fit(model, split, split, settings, progress=False)


def test_learns():
    train, val = blobs(90), blobs(60)
    model = network()
    assert evaluate(model, val) < 0.8
    history = fit(model, train, val, Settings(steps=80, batch_size=16, learning_rate=0.03))
    assert history.val_score == evaluate(model, val) > 0.95
    assert len(history.losses) == len(history.seconds) == 80
    assert history.losses[-1] < 0.2 * history.losses[0]
    assert 0 < history.seconds_per_step < 1


def test_the_seed_decides_the_run():
    settings, split = Settings(steps=12, batch_size=8, seed=3), blobs(30)
    first, history = trained(settings, split, dropout=0.5)
    torch.rand(17)  # what the global generator did before must not matter
    second, again = trained(settings, split, dropout=0.5)
    assert history.losses == again.losses
    assert torch.equal(weights(first), weights(second))
    _, other = trained(dataclasses.replace(settings, seed=4), split, dropout=0.5)
    assert other.losses != history.losses


def test_global_random_state_is_left_alone():
    model, split = network(0.5), blobs(30)
    before = torch.get_rng_state()
    fit(model, split, split, Settings(steps=3, batch_size=8, seed=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [4, 7, 25])
def test_every_image_comes_once_before_any_comes_again(batch_size):
    seen = []

    class Watch(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.extend(x[:, 0].int().tolist())
                assert len(x) == batch_size
            return super().forward(x)

    numbers = Split(torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.int64))
    fit(Watch(1, 2), numbers, numbers, Settings(steps=20, batch_size=batch_size))
    assert len(seen) == 20 * batch_size
    epochs = [seen[i : i + 10] for i in range(0, len(seen) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_rate_rises_then_falls():
    settings = Settings(steps=100, learning_rate=2.0, warmup=0.1)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[-1] < 0.01
    assert all(0 < r <= 2 for r in map(Settings(steps=1, learning_rate=2, warmup=0).rate, [0]))


def test_epochs_are_kept_apart():
    sizes, seen = [], []

    class Watch(nn.Linear):
        def forward(self, x):
            if self.training:
                sizes.append(len(x))
                seen.extend(x[:, 0].int().tolist())
            return super().forward(x)

    numbers = Split(torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.int64))
    settings = Settings(steps=9, batch_size=4, epoch_steps=3, learning_rate=1e-3)
    history = fit(Watch(1, 2), numbers, None, settings)
    assert sizes == [4, 4, 2] * 3
    assert all(sorted(seen[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert math.isnan(history.val_score)
    with pytest.raises(ValueError, match="10 images in batches of 4 are 3 steps an epoch.* 2"):
        fit(Watch(1, 2), numbers, None, dataclasses.replace(settings, epoch_steps=2))


def test_the_rate_of_an_epoch_is_that_of_a_step_among_as_many():
    by_step = Settings(steps=20, learning_rate=2.0, warmup=0.1)
    by_epoch = dataclasses.replace(by_step, steps=60, epoch_steps=3)
    assert [by_epoch.rate(step) for step in range(60)] == [
        by_step.rate(epoch) for epoch in range(20) for _ in range(3)
    ]


def test_weight_decay_is_coupled_except_in_adamw():
    """Without a gradient of its own, a decayed weight moves by the rate under Adam (a step's
    size is that of the normalised gradient), in proportion to itself under the others."""
    weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    decayed = {"adamw": weight * 5e-4, "sgd": weight * 5e-4, "adam": weight.sign() * 1e-3}
    for name, step in decayed.items():
        model = nn.Linear(2, 2)
        model.weight.data.copy_(weight)
        settings = Settings(1, learning_rate=1e-3, weight_decay=0.5, optimizer=name)
        Step(model, settings)(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
        torch.testing.assert_close(weight - model.weight.detach(), step, rtol=1e-3, atol=0)


def test_frozen_parameters_stay():
    model, split = network(), blobs(30)
    model[1].requires_grad_(False)
    before, head = model[1].weight.clone(), model[-1].weight.clone()
    fit(model, split, split, Settings(steps=3, batch_size=8))
    assert torch.equal(model[1].weight, before)
    assert not torch.equal(model[-1].weight, head)


def test_vectors_are_not_decayed():
    model = network()
    step = Step(model, Settings(steps=1, weight_decay=0.3))
    groups = step.optimizer.param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert {decay[p] for p in model.parameters() if p.ndim > 1} == {0.3}
    assert {decay[p] for p in model.parameters() if p.ndim == 1} == {0.0}


def test_clipping_bounds_the_gradient():
    model, split = network(), blobs(8)
    Step(model, Settings(steps=1, clip_norm=1e-3))(split.images, split.labels)
    norms = [p.grad.norm().item() for p in model.parameters()]
    assert math.hypot(*norms) == pytest.approx(1e-3, rel=1e-3)


def test_label_smoothing_is_used():
    model, split = network(), blobs(8)
    expected = nn.functional.cross_entropy(
        model(split.images), split.labels, label_smoothing=0.5
    ).item()
    step = Step(model, Settings(steps=1, label_smoothing=0.5))
    assert step(split.images, split.labels) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step(bad):
    class Breaks(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (bad if self.calls == 3 else 1)

    split = Split(torch.randn(20, 4), torch.zeros(20, dtype=torch.int64))
    model = Breaks(4, 2)
    with pytest.raises(FloatingPointError, match=r"at step 3 of 9 \(learning rate .*lower"):
        fit(model, split, split, Settings(steps=9, batch_size=5))
    assert weights(model).isfinite().all()


def test_clear_errors():
    split, empty = blobs(6), Split(torch.empty(0, 1, 3, 3), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one image"):
        fit(network(), empty, split, Settings(steps=1))
    with pytest.raises(ValueError, match="empty split"):
        evaluate(network(), empty)
    with pytest.raises(ValueError, match="no parameter of this Sequential requires a gradient"):
        fit(network().requires_grad_(False), split, split, Settings(steps=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("warmup", 1.5),
        ("weight_decay", -0.1),
        ("optimizer", "lamb"),
        ("epoch_steps", 0),
        ("label_smoothing", 1.0),
        ("clip_norm", 0.0),
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {value}"):
        Settings(**{"steps": 1, field: value})


def test_evaluate_counts_and_keeps_the_mode():
    class Parity(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return torch.stack([x[:, 0] % 2 == 0, x[:, 0] % 2 == 1], dim=1).float()

    split = Split(torch.arange(10.0)[:, None], torch.tensor([0, 1] * 4 + [1, 0]))
    model = Parity()
    assert evaluate(model, split, batch_size=3) == 0.8
    assert model.training
    assert evaluate(model.eval(), split) == 0.8
    assert not model.training


def test_the_first_steps_do_not_count():
    assert History((), (9.0,) * 5 + (1.0, 2.0, 3.0, 2.0, 2.0), 0.0).seconds_per_step == 2.0
    assert History((), (9.0, 1.0), 0.0).seconds_per_step == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_trains_on_a_gpu():
    split = blobs(90)
    model = network()
    history = fit(model, split, split, Settings(steps=60, learning_rate=0.03), device="cuda")
    assert next(model.parameters()).is_cuda
    assert history.val_score == evaluate(model, split) > 0.9


def test_on_step_is_called_after_every_step():
    torch.manual_seed(0)
    model, seen = network(), []
    before = weights(model)
    fit(
        model, blobs(30), None, Settings(3, 10), progress=False,
        on_step=lambda done: seen.append((done, torch.equal(weights(model), before))),
    )  # fmt: skip
    assert seen == [(1, False), (2, False), (3, False)]


def test_an_objective_of_the_model_itself():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(9, 9)

        def memtl_loss(self, images, labels):
            flat = images.flatten(1)
            return (self.layer(flat) - flat).square().mean()

        def memtl_count(self, images, labels):
            right = (self.layer(images.flatten(1)) - images.flatten(1)).square().mean(1) < 0.2
            return torch.stack([right.sum(), torch.tensor(len(images)), right.sum()]).view(3, 1)

    torch.manual_seed(0)
    model, split = Autoencoder(), blobs(60)
    assert evaluate(model, split) < 0.5
    history = fit(model, split, split, Settings(300, 20, 2e-2), progress=False)
    assert history.val_score > 0.9


def test_a_task_that_scores_itself():
    split = blobs(9)
    asked = []

    def own(model, part):
        asked.append(part is split)
        return 0.25

    model = network()
    assert score(model, Task("some", 3, split, split, split, "own", own), split) == 0.25
    assert asked == [True]
    assert score(model, Task("some", 3, split, split, split), split) == evaluate(model, split)
