"""What happens between backward and the next forward: accumulation, clipping, optimizers, averages,
hooks, and layers that are frozen or thawed on the way."""

import copy

import pytest
import torch
from torch import nn

import memtl
from tests.works.matrix import (
    COLUMNS,
    EXACT,
    LOSSY,
    assert_follows,
    assert_trains,
    build,
    on,
    plain_step,
    train,
    trained,
)


@on(*COLUMNS)
def test_gradient_accumulation(column):
    case = build(column)

    def step(case, model, optimizer):
        optimizer.zero_grad()
        total = 0
        for i in range(0, len(case.x), 4):
            loss = case.loss(model, slice(i, i + 4)) / 4
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    assert_trains(case, step)


@on(*EXACT, "vqt", "rep-net")
def test_accumulated_gradients_are_those_of_the_larger_batch(column):
    case = build(column)
    model = case.ours.eval()
    case.loss(model).backward()
    whole = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    for i in range(0, len(case.x), 4):
        (case.loss(model, slice(i, i + 4)) * 4 / len(case.x)).backward()
    for name, p in trained(model).items():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["norm", "value"])
@on(*COLUMNS)
def test_gradient_clipping(column, how):
    case = build(column)
    norms = []

    def step(case, model, optimizer):
        optimizer.zero_grad()
        loss = case.loss(model)
        loss.backward()
        if how == "norm":
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            after = torch.stack([p.grad.norm() for p in trained(model).values()]).norm()
            assert after <= 0.1001
        else:
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            assert max(p.grad.abs().max() for p in trained(model).values()) <= 1.001e-3
        optimizer.step()
        return loss

    assert_trains(case, step)
    assert how == "value" or min(norms) > 0.1


OPTIMIZERS = {
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 3e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 3e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 3e-3, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@on("fast", "low-bit", "frozen")
def test_optimizers(column, optimizer):
    make = OPTIMIZERS[optimizer]
    case = build(column)
    assert_trains(case, optimizer=lambda model: make(list(trained(model).values())))


@on("fast", "small", "low-bit", *EXACT)
def test_lbfgs(column):
    case = build(column)

    def step(case, model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = case.loss(model)
            loss.backward()
            return loss

        return optimizer.step(closure)

    def lbfgs(model):
        return torch.optim.LBFGS(trained(model).values(), 0.1, max_iter=4)

    assert_trains(case, step, optimizer=lbfgs, steps=7)


@on(*COLUMNS)
def test_an_optimizer_inside_backward(column):
    """A step as soon as a parameter's gradient is there, which is then freed."""
    case = build(column)

    def inside(model):
        for p in trained(model).values():
            own = torch.optim.AdamW([p], 3e-3)

            def step(p, own=own):
                own.step()
                own.zero_grad()

            p.register_post_accumulate_grad_hook(step)
        return torch.optim.SGD(trained(model).values(), 0)

    def step(case, model, optimizer):
        loss = case.loss(model)
        loss.backward()
        assert all(p.grad is None for p in trained(model).values())
        return loss

    assert_trains(case, step, optimizer=inside)


@pytest.mark.parametrize("kind", ["torch", "timm"])
@on(*COLUMNS)
def test_averaged_weights(column, kind):
    case, averages = build(column), []

    def step(case, model, optimizer):
        if not averages or averages[-1][0] is not model:
            averages.append((model, average(model, kind)))
        loss = plain_step(case, model, optimizer)
        ema = averages[-1][1]
        ema.update_parameters(model) if kind == "torch" else ema.update(model)
        return loss

    assert_trains(case, step)
    (stock, of_stock), (ours, of_ours) = averages
    of_stock.eval(), of_ours.eval()
    assert type(of_ours.module) is type(ours)  # a copy is as much converted
    with torch.no_grad():
        expected, found = of_stock(case.x), of_ours(case.x)
    assert not torch.equal(found, ours.eval()(case.x))
    if case.exact:
        assert torch.equal(found, expected)
    # The average of the weights is that of the steps: as if by hand.
    of_ours.train()
    case.loss(of_ours.module).backward()


def average(model, kind):
    if kind == "torch":
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
        return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
    return pytest.importorskip("timm").utils.ModelEmaV3(model, decay=0.8)


@on(*COLUMNS)
def test_hooks_on_modules_and_parameters(column):
    case = build(column)
    plain = train(case, copy.deepcopy(case.ours), steps=3)
    fired = {"forward": 0, "pre": 0, "backward": 0, "gradient": 0}

    def count(what, result=None):
        def hook(*args):
            fired[what] += 1
            return result

        return hook

    for module in case.ours.modules():
        if not list(module.children()):
            module.register_forward_hook(count("forward"))
            module.register_forward_pre_hook(count("pre"))
        if isinstance(module, nn.Linear):  # torch allows none in front of what works in place
            module.register_full_backward_hook(count("backward"))
    for p in trained(case.ours).values():
        p.register_hook(count("gradient"))
    assert train(case, case.ours, steps=3) == plain
    assert all(fired.values()), fired
    assert fired["gradient"] == 3 * len(trained(case.ours))


@on(*LOSSY, *EXACT)
def test_freezing_and_thawing_on_the_way(column):
    case = build(column)
    if column in LOSSY:
        half = [n for n in trained(case.ours) if n.startswith(("patch_embed", "blocks.0"))]
    else:
        half = list(trained(case.ours))[::2]
    kept = []

    def step(case, model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        step.count += 1
        frozen = step.count % 3 == 2
        for name in half:
            model.get_parameter(name).requires_grad_(not frozen)
        with memtl.memory.SavedTensors(model) as saved:
            loss = case.loss(model)
        kept.append(saved.bytes)
        loss.backward()
        assert all((model.get_parameter(n).grad is None) == frozen for n in half)
        optimizer.step()
        return loss

    for model in (case.stock, case.ours):
        step.count = 0
        made = train(case, model, step)
        if model is case.stock:
            expected, kept = made, []
    assert kept[1] < kept[0] == kept[2] and kept[3] == kept[0]
    assert made == expected if case.exact else assert_follows(made, expected, column) is None
