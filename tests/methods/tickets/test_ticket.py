"""Ticket: what it says, its file, and what is refused."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import memtl.files
from memtl import Ticket, TicketConfig, draw_ticket
from memtl.methods.tickets import masks, permute_layers, saved
from memtl.reference.bits import bits_unpack
from tests.helpers import assert_same
from tests.methods.tickets.small import bert, convs, network, pruned, vit


def drawn(sparsity=0.7, name="bert", **options):
    model, x = network(name)
    return model, draw_ticket(model, TicketConfig(sparsity=sparsity, **options), task="mnli")


def test_what_a_ticket_says():
    model, ticket = drawn()
    total = sum(layer.size for layer in ticket.layers)
    kept = sum(layer.kept for layer in ticket.layers)
    assert kept == total - round(0.7 * total)
    assert ticket.sparsity == pytest.approx(0.7, abs=1 / total)
    assert ticket.nbytes == sum(-(-layer.size // 8) for layer in ticket.layers)
    layer = ticket.layers[0]
    assert layer.name == "encoder.layer.0.attention.self.query.weight" and layer.shape == (32, 32)
    mask = bits_unpack(ticket.masks[layer.name], layer.size)
    assert layer.kept == mask.sum() and layer.density == layer.kept / layer.size
    assert layer.sparsity == 1 - layer.density
    text = str(ticket)
    assert "magnitude ticket of mnli, round 1" in text and f"{kept:,} of {total:,}" in text
    assert "encoder.layer.*.attention.self.query.weight x2" in text and "[48, 32]" in text
    assert len(text.splitlines()) == 8
    report = ticket.apply(model)
    assert (report.pruned, report.total) == (total - kept, total)
    assert report.mask_bytes == ticket.nbytes and report.optimizer_bytes == 8 * (total - kept)
    assert f"{total - kept:,} of {total:,}" in str(report) and "70.0%" in str(report)
    assert ticket.source.model == "BertForSequenceClassification" and ticket.source.task == "mnli"


def test_equality_shuffles_and_overlap():
    _, ticket = drawn()
    other = ticket.shuffled(1)
    assert ticket == ticket and ticket != other and ticket != "ticket"
    assert other == ticket.shuffled(1) != ticket.shuffled(2)
    assert [a.kept for a in other.layers] == [a.kept for a in ticket.layers]
    assert other.source.scheme == "magnitude, shuffled by 1" and other.shapes == ticket.shapes
    assert ticket.overlap(ticket) == 1
    both = either = 0
    for layer in ticket.layers:
        a, b = (bits_unpack(t.masks[layer.name], layer.size) for t in (ticket, other))
        both, either = both + int((a & b).sum()), either + int((a | b).sum())
    assert ticket.overlap(other) == other.overlap(ticket) == both / either
    assert 0.1 < ticket.overlap(other) < 0.25  # .3 * .3 / (1 - .7 * .7) = .18
    with pytest.raises(ValueError, match="no weight in common"):
        ticket.overlap(drawn(name="vit")[1])
    wider = draw_ticket(bert(intermediate_size=64), TicketConfig(sparsity=0.5))
    with pytest.raises(ValueError, match=r"intermediate.dense.weight is \[48, 32\] here and \[64"):
        ticket.overlap(wider)


def test_other_heads_and_what_does_not_fit():
    model, ticket = drawn()
    language = bert("ForMaskedLM")
    state = {name: t.clone() for name, t in language.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"fit this BertForMaskedLM:\n  pooler.dense.weight: there"
    ):
        ticket.apply(language)
    wide = bert(intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"\[48, 32\] in the ticket, \[64, 32\] here") as error:
        ticket.apply(wide)
    assert "... 8 in all" in str(error.value) and len(str(error.value).splitlines()) == 5
    for other in (language, wide):
        assert not pruned(other)
    for name, t in language.state_dict().items():
        assert_same(t, state[name])
    small = draw_ticket(language, TicketConfig(sparsity=0.5))
    small.apply(model)
    assert model.bert.pooler.dense.weight.all() and Ticket.of(model) == small
    tied = nn.ModuleDict({"0": nn.Linear(4, 5), "1": nn.Embedding(5, 4)})
    linear = draw_ticket(tied, TicketConfig(sparsity=0.5))
    tied["1"].weight = tied["0"].weight
    with pytest.raises(ValueError, match="is an embedding's too"):
        linear.apply(tied)
    with pytest.raises(ValueError, match="is on the meta device"):
        small.apply(bert().to("meta"))
    with torch.inference_mode():
        read_only = bert()
    with pytest.raises(ValueError, match="was made in inference mode"):
        small.apply(read_only)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    squares = draw_ticket(layers, TicketConfig(sparsity=0.5, level="layer"))
    layers[1].weight = nn.Parameter(layers[0].weight.data)  # not the same parameter
    with pytest.raises(ValueError, match="1.weight: has the memory of 0.weight"):
        squares.apply(layers)
    assert not pruned(read_only) and not pruned(layers) and layers[0].weight.all()
    with pytest.raises(TypeError, match="Module"):
        ticket.apply("model")
    with pytest.raises(TypeError, match="sparse must be None, True or False, got 'yes'"):
        ticket.apply(bert(), sparse="yes")


def test_masks_that_do_not_fit_are_no_ticket():
    _, ticket = drawn()
    name = "encoder.layer.0.output.dense.weight"  # [32, 48]
    for bits in (ticket.masks[name][:-1], ticket.masks[name].bool()):
        with pytest.raises(ValueError, match=rf"mask of {name} has to be uint8 \[192\] for 1536"):
            Ticket(ticket.masks | {name: bits}, ticket.shapes, ticket.config, ticket.source)
    with pytest.raises(ValueError, match="of the same weights"):
        Ticket({name: ticket.masks[name]}, ticket.shapes, ticket.config, ticket.source)


def test_one_ticket_at_a_time():
    model, ticket = drawn()
    with pytest.raises(ValueError, match="has no ticket"):
        ticket.remove(model)
    ticket.apply(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for other in (ticket, ticket.shuffled(0)):
        with pytest.raises(ValueError, match=r"has a ticket: Ticket.of\(model\).remove"):
            other.apply(model)
    with pytest.raises(ValueError, match="has a ticket"):
        draw_ticket(model, TicketConfig(sparsity=0.9))
    with pytest.raises(ValueError, match="is another one"):
        ticket.shuffled(0).remove(model)
    for name, t in model.state_dict().items():
        assert_same(t, state[name])
    assert Ticket.of(model).source == ticket.source
    Ticket.of(model).remove(model)
    with pytest.raises(ValueError, match="has no ticket"):
        Ticket.of(model)
    with pytest.raises(TypeError, match="Module"):
        Ticket.of(None)


# the file


@pytest.mark.parametrize("name", ["bert", "convs", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_goes_both_ways(tmp_path, name, dtype):
    model, ticket = drawn(0.8, name)
    model.to(dtype)
    path = tmp_path / "t.safetensors"
    assert ticket.save(path) == path
    again = Ticket.load(str(path))
    assert again == ticket and again.config == ticket.config and again.source == ticket.source
    assert again.values is None
    with pytest.raises(ValueError, match="saved without weights"):
        again.restore(model)
    ticket.save(path, model)
    again = Ticket.load(path)
    assert again == ticket and again.values is not None
    assert all(again.values[a.name].shape == (a.kept,) for a in ticket.layers)
    assert os.listdir(tmp_path) == ["t.safetensors"]
    other, _ = network(name)
    other.to(dtype)
    again.restore(other)
    again.apply(other)
    ticket.apply(model)
    for (key, (ours, _)), (theirs, _) in zip(
        pruned(other).items(), pruned(model).values(), strict=True
    ):
        assert ours.any(), key
        assert_same(ours.detach(), theirs.detach())
    with torch.no_grad():
        for weight, _ in pruned(other).values():
            weight.mul_(2)
    again.restore(other)  # under the ticket
    for (ours, _), (theirs, _) in zip(pruned(other).values(), pruned(model).values(), strict=True):
        assert_same(ours.detach(), theirs.detach())
    again.save(path)
    assert Ticket.load(path).values.keys() == again.values.keys()
    ticket.remove(model)
    ticket.shuffled(3).apply(model)
    with pytest.raises(ValueError, match="has another ticket"):
        again.restore(model)


def test_bytes_of_a_file(tmp_path):
    """Of layers as BERT's: masks 1/32 of float32, with a tenth of the weights 1/10 more."""
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    model = bert(**sizes)
    ticket = draw_ticket(model, TicketConfig(sparsity=0.9))
    dense = 4 * sum(layer.size for layer in ticket.layers)
    path = ticket.save(tmp_path / "t.safetensors")
    assert ticket.nbytes == dense / 32 and path.stat().st_size <= 0.032 * dense
    ticket.save(path, model)
    assert path.stat().st_size <= 0.14 * dense


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    _, ticket = drawn()
    path = ticket.save(tmp_path / "t.safetensors")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(memtl.files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        ticket.shuffled(1).save(path)
    monkeypatch.undo()
    assert Ticket.load(path) == ticket and os.listdir(tmp_path) == ["t.safetensors"]


def rewritten(path, change):
    """The file of a ticket after ``change(record, tensors)``, with a sha256 that is right."""
    with safe_open(str(path), "pt") as file:
        record = json.loads(file.metadata()[saved.KEY])
    tensors = load_file(path)
    del record["sha256"]
    change(record, tensors)
    record["sha256"] = masks.digest(tensors, json.dumps(record, sort_keys=True))
    save_file(tensors, path, {saved.KEY: json.dumps(record)})


KEY = "mask.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, t: r.update(version=2), "version 2 is unknown, this memtl reads 1"),
        (lambda r, t: t.pop(KEY), "'mask.0.weight' is missing"),
        (lambda r, t: t.update(more=torch.zeros(1)), "'more' is missing or too much"),
        (lambda r, t: r["layers"].pop("0.weight"), "'mask.0.weight' is missing or too much"),
        (lambda r, t: t.update({KEY: t[KEY][:-1]}), r"0.weight has to be uint8 \[24\].*\[23\]"),
        (lambda r, t: t.update({KEY: t[KEY].to(torch.int8)}), "has to be uint8"),
        (lambda r, t: t[KEY][-1:].add_(128), "mask of 0.weight has bits behind its last"),
        (lambda r, t: t[KEY][:1].bitwise_xor_(1), "mask of 0.weight keeps"),
        (lambda r, t: r["layers"]["0.weight"].__setitem__(0, [7, 3, 3]), "0.weight has to be"),
        (lambda r, t: r["layers"].update({"0.weight": [["a"], 2]}), "TypeError"),
        (lambda r, t: r.pop("config"), "KeyError: 'config'"),
        (lambda r, t: r["config"].update(sparsity=3), "sparsity must be in"),
        (lambda r, t: r["source"].pop("model"), "TypeError.*model"),
        (lambda r, t: t.update({f"weight{KEY[4:]}": torch.randn(3)}), r"the weights of 0.weight"),
    ],
)
def test_files_that_are_wrong(tmp_path, change, message):
    model = nn.Sequential(nn.Conv2d(3, 7, 3))
    ticket = draw_ticket(model, TicketConfig(sparsity=0.5))
    path = ticket.save(tmp_path / "t.safetensors", model if "weights of" in message else None)
    rewritten(path, lambda record, tensors: None)
    assert Ticket.load(path) == ticket
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as error:
        Ticket.load(path)
    assert str(path) in str(error.value)


def test_files_that_are_damaged(tmp_path):
    model, ticket = drawn(name="convs")
    path = ticket.save(tmp_path / "t.safetensors", model)
    content = path.read_bytes()
    for broken in (content[:-1], content[:40], b"", b"\xff" * 100, content + b"0"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"t.safetensors is damaged"):
            Ticket.load(path)
    for at in (len(content) - 3, content.index(b'\\"task'), content.index(b"mnli") + 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            Ticket.load(path)
    save_file({"weight": torch.randn(3)}, path)
    with pytest.raises(ValueError, match="is no ticket"):
        Ticket.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Ticket.load(tmp_path / "nowhere")


# the control of other weights


def test_layers_are_exchanged():
    model, _ = network("vit")
    stock, again = copy.deepcopy(model), copy.deepcopy(model)
    moved = permute_layers(model, 5)
    assert 0 < moved <= 8
    assert permute_layers(again, 5) == moved
    for name, ours in model.state_dict().items():
        assert_same(ours, again.state_dict()[name])
        place = stock.state_dict()[name]
        if name.startswith("blocks") and name.endswith("weight") and ours.dim() == 2:
            alike = [t for t in stock.state_dict().values() if t.shape == ours.shape]
            assert any(torch.equal(ours, t) for t in alike)
        else:
            assert_same(ours, place)
    differing = sum(
        not torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), stock.state_dict().values(), strict=True)
    )
    assert differing == moved
    with pytest.raises(ValueError, match="no two weights"):
        permute_layers(convs(), 0)
    draw_ticket(again, TicketConfig(sparsity=0.5)).apply(again)
    with pytest.raises(ValueError, match="this VisionTransformer has a ticket"):
        permute_layers(again, 0)
    with pytest.raises(ValueError, match="matches no weight"):
        permute_layers(vit(), 0, ("nothing",))
