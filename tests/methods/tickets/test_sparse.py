"""Tickets whose linear layers multiply with the surviving weights alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import memtl
from memtl import Ticket, TicketConfig, draw_ticket
from memtl.memory import saved_bytes
from memtl.nn import compress_weights
from memtl.nn.sparse import SparseLinear
from tests.helpers import assert_same
from tests.methods.tickets.small import assert_zero, bert, loss, network, pruned

ALWAYS = {"sparse": True}


def pair(name: str, sparsity: float, **options):
    """The same ticket, with sparse and with dense products; input and report."""
    model, x = network(name)
    model.eval()
    x = x.repeat(8, *[1] * (x.dim() - 1))  # at few rows it does not pay
    dense = copy.deepcopy(model)
    ticket = draw_ticket(model, TicketConfig(sparsity=sparsity, level="layer"))
    ticket.apply(dense, sparse=False)
    return model, dense, x, ticket.apply(model, **options)


def sparse_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def assert_close_training(model, dense, x, tolerance=1e-4):
    model.zero_grad(), dense.zero_grad()
    ours, theirs = loss(model, x), loss(dense, x)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    ours.backward(), theirs.backward()
    assert_zero(model)
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        scale = q.grad.norm().clamp_min(1e-6)  # of keys' biases it is rounding alone
        assert (p.grad - q.grad).norm() <= tolerance * scale or q.grad.norm() < 1e-6, name


@pytest.mark.parametrize("name", ["bert", "vit", "convs"])
@pytest.mark.parametrize("options", [{}, ALWAYS], ids=str)
def test_sparse_products_are_the_dense_ones(name, options):
    model, dense, x, report = pair(name, 0.9, **options)
    linear = {n for n, m in dense.named_modules() if isinstance(m, nn.Linear)} - {
        "classifier",
        "head",
    }
    assert sparse_layers(model) == linear and not sparse_layers(dense)
    prefix = "bert." if name == "bert" else ""
    assert {f"{prefix}{n}" for n in report.sparse} == {f"{n}.weight" for n in linear}
    assert f"{len(linear)} layers run sparse" in str(report)
    assert_close_training(model, dense, x)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.step()
        assert_zero(model)
        loss(model, x).backward()
    assert saved_bytes(model, x) <= saved_bytes(dense, x)
    ticket = Ticket.of(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sparse_layers(again) == linear
        assert_same(loss(again, x).detach(), loss(model, x).detach())
    ticket.remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in network(name)[0].modules()]
    assert not any(hasattr(m, "memtl_density") for m in model.modules())


def test_where_it_does_not_pay_products_are_dense():
    model, dense, x, report = pair("vit", 0.3)
    assert not report.sparse and not sparse_layers(model)
    model, dense, x, report = pair("vit", 0.95)
    assert report.sparse
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model(x), dense(x))
    assert_same(model(x[:1]), dense(x[:1]))
    model.double(), dense.double()
    assert_same(model(x.double()), dense(x.double()))
    model.float(), dense.float()
    assert not torch.equal(model(x), dense(x))  # sums in another order


def test_always_is_always():
    model, dense, x, report = pair("vit", 0.3, **ALWAYS)
    assert len(report.sparse) == 8
    assert_close_training(model, dense, x)
    assert_close_training(model.double(), dense.double(), x.double(), 1e-9)
    model.bfloat16(), dense.bfloat16()
    y, z = model(x.bfloat16()).float(), dense(x.bfloat16()).float()
    assert (y - z).norm() <= 0.1 * z.norm()


def test_compile_and_checkpoint():
    model, dense, x, _ = pair("vit", 0.9)
    expected = loss(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(compiled, x), expected, rtol=1e-4, atol=1e-5)
    assert_close_training(compiled, dense, x)
    model.set_grad_checkpointing(True)
    assert_close_training(model, dense, x)


@pytest.mark.parametrize("first", ["ticket", "conversion"])
def test_converted_layers_are_sparse_too(first):
    config = memtl.FrozenConfig()
    model, x = network("bert")
    model.eval()
    x = x.repeat(8, 1)
    ticket = draw_ticket(model, TicketConfig(sparsity=0.9))
    dense = copy.deepcopy(model)
    ticket.apply(dense, sparse=False)
    if first == "ticket":
        ticket.apply(model)
        memtl.apply(model, config)
    else:
        memtl.apply(model, config)
        ticket.apply(model)
    with torch.profiler.profile() as profile:
        loss(model, x)
    called = [e.count for e in profile.key_averages() if e.key == "memtl::masked_linear"]
    assert called == [12]  # the pooler reads one word of each sentence
    assert_close_training(model, dense, x)
    memtl.unconvert(model)
    assert_close_training(model, dense, x)
    ticket.remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in bert().modules()]


def test_weights_in_8_bits_are_multiplied_as_they_are():
    model, _, x, _ = pair("vit", 0.9)
    model.blocks.requires_grad_(False)
    compress_weights(model)
    y = loss(model, x)
    y.backward()
    assert y.isfinite() and all(bool(w.any()) for w, _ in pruned(model).values())


def test_attention_multiplies_itself():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    report = draw_ticket(model, TicketConfig(sparsity=0.8)).apply(model, sparse=True)
    assert report.sparse == ("out.weight",)
