"""CompactOptimizer: what the dense optimizer does to masked weights, with state for survivors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import memtl.functional as MF
from memtl.methods.tickets import CompactOptimizer, state_bytes

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "adam-foreach": (torch.optim.Adam, {"lr": 1e-2, "foreach": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5, "centered": True}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
    "radam": (torch.optim.RAdam, {"lr": 1e-2}),
    "adamax": (torch.optim.Adamax, {"lr": 1e-2}),
    "rprop": (torch.optim.Rprop, {"lr": 1e-2}),
}
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(37, 53), nn.Tanh(), nn.Linear(53, 11))


def pruned(model, keep=0.3):
    """The bits of each weight matrix, by parameter; what did not survive is 0."""
    weights = [p for p in model.parameters() if p.dim() == 2]
    bits = MF.magnitude_masks(weights, int(keep * sum(p.numel() for p in weights)))
    with torch.no_grad():
        for p, b in zip(weights, bits, strict=True):
            p.copy_(torch.ops.memtl.bits_apply(p, b, 1.0))
    return dict(zip(weights, bits, strict=True))


def backward(model, i):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(8, 37, generator=generator)
    model(x).square().mean().backward()


def kept(bits, p):
    return torch.ops.memtl.bits_apply(torch.ones_like(p), bits, 1.0).bool()


def dense_step(model, masks, optimizer):
    """What one does without it: gradients masked before, weights after."""
    for p, bits in masks.items():
        p.grad = torch.ops.memtl.bits_apply(p.grad, bits, 1.0)
    optimizer.step()
    with torch.no_grad():
        for p, bits in masks.items():
            p.copy_(torch.ops.memtl.bits_apply(p, bits, 1.0))


@EVERY
def test_survivors_are_those_of_the_dense_optimizer(name):
    kind, options = OPTIMIZERS[name]
    compact, dense = network(), network()
    masks, dense_masks = pruned(compact), pruned(dense)
    ours = CompactOptimizer(compact.parameters(), masks, kind, **options)
    theirs = kind(dense.parameters(), **options)
    for i in range(4):
        for model, optimizer in ((compact, ours), (dense, theirs)):
            optimizer.zero_grad()
            backward(model, i)
        for p, q in zip(compact.parameters(), dense.parameters(), strict=True):
            q.grad.copy_(p.grad)  # the same to the last bit, whatever the steps before
        ours.step()
        dense_step(dense, dense_masks, theirs)
        for p, q in zip(compact.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        for p, bits in masks.items():
            assert (p[~kept(bits, p)] == 0).all() and (p[kept(bits, p)] != 0).any()


def test_the_state_is_of_survivors():
    model, whole = network(), network()
    masks = pruned(model, 0.2)
    ours = CompactOptimizer(model.parameters(), masks, torch.optim.AdamW, lr=1e-3)
    theirs = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    assert state_bytes(ours) == state_bytes(theirs) == 0
    for m, optimizer in ((model, ours), (whole, theirs)):
        backward(m, 0)
        optimizer.step()
    matrices = sum(p.numel() for p in masks)
    rest = sum(p.numel() for p in model.parameters()) - matrices
    steps = 4 * len(list(model.parameters()))
    assert state_bytes(theirs) == 8 * (matrices + rest) + steps
    assert state_bytes(ours) == 8 * (int(0.2 * matrices) + rest) + steps
    between = [p for group in ours.inner.param_groups for p in group["params"]]
    vectors = [p for p in between if all(p is not q for q in model.parameters())]
    assert len(vectors) == len(masks)
    assert all(v.untyped_storage().nbytes() == 0 and v.grad is None for v in vectors), "kept twice"


@pytest.mark.parametrize("name", ["momentum", "adamw", "rmsprop"])
def test_resuming_goes_on_bit_for_bit(name):
    kind, options = OPTIMIZERS[name]
    model = network()
    masks = pruned(model)
    optimizer = CompactOptimizer(model.parameters(), masks, kind, **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for i in range(2):
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()
        schedule.step()
    again = copy.deepcopy(model)
    masks_again = {
        q: masks[p]
        for p, q in zip(model.parameters(), again.parameters(), strict=True)
        if p in masks
    }
    resumed = CompactOptimizer(again.parameters(), masks_again, kind, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == options["lr"] / 4
    for i in range(2, 4):
        for m, o in ((model, optimizer), (again, resumed)):
            o.zero_grad()
            backward(m, i)
            o.step()
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert state_bytes(resumed) == state_bytes(optimizer)


def test_a_state_of_other_survivors_is_refused_and_nothing_changes():
    model = network()
    masks = pruned(model, 0.5)
    optimizer = CompactOptimizer(model.parameters(), masks, torch.optim.Adam)
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other = network()
    fewer = CompactOptimizer(other.parameters(), pruned(other, 0.1), torch.optim.Adam)
    whole = torch.optim.Adam(other.parameters())
    backward(other, 0)
    for source in (fewer, whole):
        source.step()
        with pytest.raises(ValueError, match=r"of parameter 0 must be \[\d+\], a number for each"):
            optimizer.load_state_dict(source.state_dict())
    after = optimizer.state_dict()
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_groups_options_and_schedules_reach_the_optimizer():
    model = network()
    masks = pruned(model)
    first, last = model[0].parameters(), model[2].parameters()
    groups = [{"params": first, "lr": 0.0}, {"params": last}]
    optimizer = CompactOptimizer(groups, masks, torch.optim.SGD, lr=0.1, momentum=0.9)
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert all(g["nesterov"] is False for g in optimizer.param_groups)
    before = copy.deepcopy(model.state_dict())
    backward(model, 0)
    optimizer.step()
    now = model.state_dict()
    assert torch.equal(now["0.weight"], before["0.weight"])
    assert not torch.equal(now["2.weight"], before["2.weight"])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_what_has_no_gradient_is_passed_over():
    model = network()
    masks = pruned(model)
    model[0].weight.requires_grad_(False)
    optimizer = CompactOptimizer(model.parameters(), masks, torch.optim.AdamW, weight_decay=0.5)
    before = model[0].weight.clone()
    backward(model, 0)
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert len(optimizer.state) == 3


def test_scaler_clipping_closure_and_later_groups():
    model = network()
    masks = pruned(model)
    more = nn.Parameter(torch.ones(3))
    optimizer = CompactOptimizer(model.parameters(), masks, torch.optim.AdamW, lr=0.1)
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    assert optimizer.inner.param_groups[1]["lr"] == 0.5
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(4, 37)).sum() + more.sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert (more < 1).all()
    weight = model[0].weight.clone()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 37)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert not torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts(dtype):
    p = nn.Parameter(torch.randn(9, 14).to(dtype).T)
    q = nn.Parameter(p.detach().contiguous())
    bits = MF.magnitude_masks([p], 40)[0]
    ours = CompactOptimizer([p], {p: bits}, torch.optim.SGD, lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    grad = torch.randn(14, 9).to(dtype)
    for _ in range(3):
        p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    assert p.stride() == (1, 14)
    assert torch.equal(p, torch.where(kept(bits, p), q, 0))


def test_a_sparse_gradient_is_refused():
    p = nn.Parameter(torch.randn(4, 2))
    bits = torch.tensor([0x0F], dtype=torch.uint8)
    optimizer = CompactOptimizer([p], {p: bits}, torch.optim.SGD)
    p.grad = torch.ones(4, 2).to_sparse()
    before = p.detach().clone()
    with pytest.raises(TypeError, match="must be dense, got torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(p, before)


def test_trying_an_optimizer_out_draws_no_random_number():
    p, state = nn.Parameter(torch.ones(8)), torch.get_rng_state()
    CompactOptimizer([p], {p: torch.tensor([3], dtype=torch.uint8)}, torch.optim.AdamW)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_survives():
    p = nn.Parameter(torch.randn(5))
    bits = torch.zeros(1, dtype=torch.uint8)
    optimizer = CompactOptimizer([p], {p: bits}, torch.optim.AdamW)
    p.grad = torch.ones(5)
    optimizer.step()
    assert (p == 0).all()


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (torch.optim.Adafactor, ValueError, "Adafactor does not update weights element by element"),
        (torch.optim.LBFGS, ValueError, "LBFGS calls a closure itself"),
        (torch.nn.Linear, TypeError, "must be a class of torch.optim.Optimizer"),
        (torch.optim.SparseAdam, ValueError, "SparseAdam cannot be compact: .*not support dense"),
    ],
)
def test_optimizers_that_cannot(optimizer, error, message):
    p = nn.Parameter(torch.randn(3, 3))
    bits = torch.ones(2, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        CompactOptimizer([p], {p: bits}, optimizer)


def test_bad_masks():
    p, q = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(2))
    bits = torch.ones(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"parameters given .* got some of \[\(2,\)\]"):
        CompactOptimizer([p], {q: bits[:1]}, torch.optim.SGD)
    with pytest.raises(ValueError, match=r"a mask \[2\] on cpu .* \[3, 3\], got \[1\] on cpu"):
        CompactOptimizer([p], {p: bits[:1]}, torch.optim.SGD)
    with pytest.raises(TypeError, match="uint8, got torch.bool"):
        CompactOptimizer([p], {p: bits.bool()}, torch.optim.SGD)
