"""Ticket.apply: what is pruned is zero, and stays zero whatever trains the rest."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import memtl
from memtl import Ticket, TicketConfig, draw_ticket
from memtl.methods.tickets import CompactOptimizer, parameter_masks, state_bytes
from memtl.nn import compress_weights, expand_weights
from memtl.nn.masked import MaskedWeight
from tests.helpers import ROOT, assert_same
from tests.methods.tickets.small import assert_zero, bert, convs, loss, network, pruned, words

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(
        p, 1e-3, momentum=0.9, weight_decay=0.1, centered=True
    ),
}


def with_ticket(name: str = "bert", sparsity: float = 0.7):
    """Products are dense, so that they are stock's bit for bit."""
    model, x = network(name)
    ticket = draw_ticket(model, TicketConfig(sparsity=sparsity))
    ticket.apply(model, sparse=False)
    return model, x, ticket


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["bert", "vit", "convs"])
def test_pruned_weights_are_zero_after_every_step(name, optimizer):
    model, x, _ = with_ticket(name)
    assert_zero(model, gradients=False)
    opt = OPTIMIZERS[optimizer](model.parameters())
    averages = [ModelEmaV3(model, 0.5), AveragedModel(model)]
    averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True))
    for _ in range(3):
        opt.zero_grad()
        for part in x.chunk(2):  # accumulated
            loss(model, part).backward()
        assert_zero(model)
        opt.step()
        assert_zero(model)
        averages[0].update(model)
        for average in averages[1:]:
            average.update_parameters(model)
        for average in averages:
            assert_zero(average, gradients=False)


def test_a_masked_model_is_the_dense_one_with_zeros():
    model, x, _ = with_ticket()
    dense = bert()
    dense.load_state_dict(model.state_dict())
    model.eval(), dense.eval()
    assert_same(model(x).logits, dense(x).logits)
    loss(model, x).backward(), loss(dense, x).backward()
    masked = {id(weight): where for weight, where in pruned(model).values()}
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        where = masked.get(id(p))
        assert_same(p.grad, q.grad if where is None else q.grad.masked_fill(where, 0))
    assert_same(
        torch.autograd.grad(loss(model, x), next(model.parameters()))[0],
        next(dense.parameters()).grad,
    )


def test_what_stays_as_it_was():
    stock, _ = network("bert")
    model = copy.deepcopy(stock)
    ticket = draw_ticket(model, TicketConfig(sparsity=0.6))
    ticket.apply(model, sparse=False)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert [m._get_name() for m in model.modules()] == [m._get_name() for m in stock.modules()]
    assert all(
        isinstance(m, type(n)) for m, n in zip(model.modules(), stock.modules(), strict=True)
    )
    assert memtl.memory.saved_bytes(model, words()) == memtl.memory.saved_bytes(stock, words())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ticket.remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in stock.named_buffers()]
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert ours._non_persistent_buffers_set == theirs._non_persistent_buffers_set
    for name, p in model.named_parameters():
        assert_same(p.detach(), before[name])
        assert not p._backward_hooks
    loss(model, words()).backward()
    weight = model.bert.encoder.layer[0].output.dense.weight
    assert (weight.grad != 0).float().mean() > 0.99


def test_gradients_that_are_not_finite_do_not_reach_pruned_weights():
    model, x, _ = with_ticket()
    (loss(model, x) * torch.nan).backward()
    for weight, where in pruned(model).values():
        assert (weight.grad[where] == 0).all() and weight.grad[~where].isnan().all()


def test_second_derivatives_go_through():
    model, x, _ = with_ticket("vit")
    weight, where = next(iter(pruned(model).values()))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (grad,) = torch.autograd.grad(loss(model, x), weight, create_graph=True)
        assert (grad[where] == 0).all()
        grad.square().sum().backward()
    assert (weight.grad[where] == 0).all() and weight.grad[~where].any()


def trained_once(model, x):
    model.zero_grad()
    loss(model, x).backward()
    torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1).step()
    return model


def test_copies_train_apart():
    model, x, ticket = with_ticket()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    for again in copies:
        assert_zero(trained_once(again, x))
        assert Ticket.of(again) == ticket
    only = copies[0]
    del model, copies
    gc.collect()
    assert_zero(trained_once(only, x))
    ticket.remove(only)
    assert not any(isinstance(m, MaskedWeight) for m in only.modules())


def test_devices_and_dtypes():
    model, x, ticket = with_ticket("vit")
    model.train()
    for to in (
        lambda m: m.double(),
        lambda m: m.type(torch.float32),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.float(),
        lambda m: m.to(memory_format=torch.channels_last),
    ):
        to(model)
        assert Ticket.of(model) == ticket
        assert_zero(trained_once(model, x.to(next(model.parameters()))))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.zero_grad()
        assert_zero(trained_once(model.double(), x.double()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    there = copy.deepcopy(model).to("meta")  # new parameters
    assert all(w.is_meta for w, _ in pruned(there).values())


def test_empty_weights_and_weights_of_no_device_leave_the_masks():
    model, x, ticket = with_ticket()
    model.to_empty(device="cpu")
    assert Ticket.of(model) == ticket
    dense, _ = network("bert")
    state = dense.state_dict()
    model.to("meta")
    assert Ticket.of(model) == ticket
    model.to_empty(device="cpu").load_state_dict(state)
    for name, buffer in dense.named_buffers():
        model.get_buffer(name).copy_(buffer)
    for name, (weight, where) in pruned(model).items():
        assert_same(weight.detach(), state[name].masked_fill(where, 0))
    assert_zero(trained_once(model, x))


def test_a_weight_that_is_put_in_its_place():
    model, x, _ = with_ticket("convs")
    before = model[0].weight
    weight = nn.Parameter(torch.randn_like(before))
    given = weight.detach().clone()
    model[0].weight = weight
    assert model[0].weight is weight
    where = pruned(model)["0.weight"][1]
    assert_same(weight.detach(), given.masked_fill(where, 0))
    assert_zero(trained_once(model, x))
    model[0].bias = nn.Parameter(torch.randn_like(model[0].bias))
    assert model[0].bias.all()


def test_what_moves_weights_that_have_no_gradient():
    model, x, ticket = with_ticket()
    matrices = [weight for weight, _ in pruned(model).values()]
    optimizer = torch.optim.Muon(matrices, 0.1)
    loss(model, x).backward()
    optimizer.step()
    assert any(weight[where].any() for weight, where in pruned(model).values())
    optimizer.register_step_post_hook(lambda *_: Ticket.hold(model))
    optimizer.step()
    assert_zero(model)
    ticket.remove(model)
    with pytest.raises(ValueError, match="has no ticket"):
        Ticket.hold(model)


def test_adapters_on_top():
    import peft

    model, x, ticket = with_ticket()
    config = peft.LoraConfig(
        target_modules=["query"], modules_to_save=["pooler"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    assert_zero(trained_once(adapted, x), gradients=False)
    assert Ticket.of(adapted) == ticket
    merged = adapted.merge_and_unload()
    query = merged.bert.encoder.layer[0].attention.self.query.weight
    assert query.all() and Ticket.of(merged) == ticket
    Ticket.hold(merged)
    assert_zero(merged, gradients=False)
    ticket.remove(merged)
    assert not pruned(merged)


def test_weights_that_are_frozen_and_thawed():
    model, x = network("bert")
    ticket = draw_ticket(model, TicketConfig(sparsity=0.7))
    model.bert.requires_grad_(False)
    ticket.apply(model)
    loss(model, x).backward()
    assert all(weight.grad is None for weight, _ in pruned(model).values())
    assert not any(p.requires_grad for p in model.bert.parameters())
    again = pickle.loads(pickle.dumps(model))
    for thawed in (model, again):
        thawed.bert.requires_grad_(True)
        assert_zero(trained_once(thawed, x))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_dense_weights_does_not_bring_pruned_ones_back(assign):
    model, x, _ = with_ticket()
    other, _ = network("bert")
    state = other.state_dict()
    given = {name: t.clone() for name, t in state.items()}
    assert not any(model.load_state_dict(state, assign=assign))
    for name, (weight, where) in pruned(model).items():
        assert_same(weight.detach(), given[name].masked_fill(where, 0))
    assert_zero(trained_once(model, x))
    if not assign:
        for name, t in given.items():  # nothing was written into what was loaded
            assert_same(state[name], t)
    name, (weight, _) = next(iter(pruned(model).items()))
    for change in (lambda s: s.pop(name), lambda s: s.update({name: torch.randn(3, 3)})):
        wrong = dict(given)
        change(wrong)
        with pytest.raises(RuntimeError, match=name):
            model.load_state_dict(wrong, assign=assign)
    del given[name]
    model.load_state_dict(given, strict=False, assign=assign)
    assert pruned(model)[name][0] is weight


def test_autocast_checkpoints_and_compile():
    model, x, _ = with_ticket("vit")
    loss(model, x).backward()
    expected = {name: weight.grad for name, (weight, _) in pruned(model).items()}

    def same_gradients(run, tolerance=1e-4):
        model.zero_grad()
        run()
        assert_zero(model)
        for name, (weight, _) in pruned(model).items():
            error = (weight.grad - expected[name]).norm() / expected[name].norm()
            assert error <= tolerance, name

    with torch.autocast("cpu", torch.bfloat16):
        y = loss(model, x)
    same_gradients(y.backward, 0.2)
    same_gradients(lambda: checkpoint(lambda x: loss(model, x), x, use_reentrant=False).backward())
    model.set_grad_checkpointing(True)
    same_gradients(lambda: loss(model, x).backward())
    model.set_grad_checkpointing(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same_gradients(lambda: loss(compiled, x).backward())
    assert_zero(trained_once(compiled, x))


def test_two_processes_of_data_parallel_training(tmp_path):
    script = str(ROOT / "tests" / "methods" / "tickets" / "parallel_process.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    store = str(tmp_path / "store")
    processes = [
        subprocess.Popen([sys.executable, script, store, str(rank)], env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"store.{rank}") for rank in range(2))
    assert first.keys() == second.keys()
    for name, t in first.items():
        assert_same(t, second[name])


def test_an_optimizer_of_the_survivors():
    model, x, ticket = with_ticket(sparsity=0.9)
    model.eval()
    other = copy.deepcopy(model)
    masks = parameter_masks(model)
    assert len(masks) == len(ticket.masks)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    compact = CompactOptimizer(model.parameters(), masks, torch.optim.AdamW, **options)
    dense = torch.optim.AdamW(other.parameters(), **options)
    for _ in range(3):
        for trained, optimizer in ((model, compact), (other, dense)):
            optimizer.zero_grad()
            loss(trained, x).backward()
            optimizer.step()
            assert_zero(trained)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    pruned_numbers = sum(layer.size - layer.kept for layer in ticket.layers)
    assert state_bytes(dense) - state_bytes(compact) == 2 * 4 * pruned_numbers


# conversion, 8 bits


@pytest.mark.parametrize("first", ["ticket", "conversion"])
@pytest.mark.parametrize("config", [memtl.BackRazorConfig(), memtl.LowBitConfig()], ids=str)
def test_conversion_before_and_after(first, config):
    model, x = network("bert")
    model.eval()
    ticket = draw_ticket(model, TicketConfig(sparsity=0.7))
    dense = copy.deepcopy(model)
    ticket.apply(dense, sparse=False)
    if first == "ticket":
        ticket.apply(model, sparse=False)
        memtl.apply(model, config)
    else:
        memtl.apply(model, config)
        assert draw_ticket(model, TicketConfig(sparsity=0.7)) == ticket
        ticket.apply(model, sparse=False)
    assert_same(model(x).logits, dense(x).logits)
    assert_zero(trained_once(model, x))
    assert_zero(trained_once(copy.deepcopy(model), x))
    memtl.unconvert(model)
    assert_zero(trained_once(model, x))
    memtl.apply(model, config)
    ticket.remove(model)
    assert isinstance(model.bert.encoder.layer[0].output.dense, memtl.nn.Layer)
    memtl.unconvert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in bert().modules()]


def test_weights_in_8_bits_stay_pruned():
    model, x, ticket = with_ticket("vit")
    model.blocks.requires_grad_(False)
    count = compress_weights(model)
    assert count == 8 and Ticket.of(model) == ticket
    dense, _ = network("vit")
    model.load_state_dict(dense.state_dict())
    assert_zero(model, gradients=False)
    loss(pickle.loads(pickle.dumps(model)), x).backward()
    assert expand_weights(model) == count
    model.requires_grad_(True)
    assert_zero(trained_once(model, x))
    compress_weights(model.blocks.requires_grad_(False))
    ticket.remove(model)
    assert not any(isinstance(m, MaskedWeight) for m in model.modules())
    assert expand_weights(model) == count


# shared weights, weights of other names


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.recurrent = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x):
        x = self.attention(*[self.second(self.first(x))] * 3)[0]
        return self.recurrent(x)[0]


def test_a_shared_weight_is_masked_once_and_by_every_holder():
    model, x = Tied(), torch.randn(2, 3, 6)
    ticket = draw_ticket(model, TicketConfig(sparsity=0.5))
    names = {"first.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert set(ticket.masks) == names
    ticket.apply(model)
    assert isinstance(model.first, MaskedWeight) and isinstance(model.second, MaskedWeight)
    assert model.first.weight_bits is model.second.weight_bits
    assert model.first.weight is model.second.weight
    assert set(Ticket.of(model).masks) == names
    for again in (model, copy.deepcopy(model)):
        assert again.first.weight is again.second.weight
        assert_zero(trained_once(again, x))
        del again.first  # the other holder is enough
        again.first = nn.Identity()
        assert_zero(trained_once(again, x))


def test_any_matrix_can_be_named():
    model, x = Tied(), torch.randn(2, 3, 6)
    config = TicketConfig(sparsity=0.5, scope=("recurrent.weight_*",), level="layer")
    ticket = draw_ticket(model, config)
    assert list(ticket.masks) == ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"]
    ticket.apply(model)
    assert_zero(trained_once(model, x))
    assert_zero(trained_once(copy.deepcopy(model).double(), x.double()))


def test_a_frozen_layer_and_methods_on_top():
    model, x, ticket = with_ticket("vit")
    memtl.apply(model, memtl.BitFitConfig(num_classes=5))
    trained_once(model, x)
    assert_zero(model, gradients=False)
    assert Ticket.of(model) == ticket


def test_a_module_without_a_model():
    model = convs()[8]
    draw_ticket(model, TicketConfig(sparsity=0.5)).apply(model)
    assert_zero(trained_once(model, torch.randn(2, 4 * 142)))
