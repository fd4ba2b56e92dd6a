"""The whole of it, on a BERT that is small enough, and what an interruption leaves."""

import dataclasses
import importlib.util
import itertools
import json
import re
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from memtl import Ticket, TicketConfig, draw_ticket
from memtl.cli import main
from memtl.lottery import Cell, Key, Run, Setup, command, work
from memtl.lottery.encoder import Encoder
from memtl.report import Journal

transformers = pytest.importorskip("transformers")

STEPS = ("--steps", "2", "--mlm-steps", "1", "--seeds", "2", "--batch-size", "8")
SPARSITIES = ("--sparsities", "10", "15", "--control-sparsities", "15", "--transfer-sparsity", "15")
TASK = ("--tasks", "package")


def arguments(model, out, *more) -> list[str]:
    return ["tickets", "--model", model, "--out", str(out), *STEPS, *SPARSITIES, *TASK, *more]


def runs(out) -> dict:
    """Every finished run without its time."""
    with Journal(out / "runs.jsonl", Run) as journal:
        return {run.key: (run.score, run.error) for run in journal}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A finished experiment, and what it printed is left to those who want it."""
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(model, out, "--permuted", "--json", str(out / "all.json"))) == 0
    return out


def test_what_it_leaves(model, whole):
    # 2 seeds of: dense; three schemes at two sparsities; shuffled, random and permuted at one
    assert len(found := runs(whole)) == 2 * (1 + 3 * 2 + 3)
    assert all(0 <= score <= 1 and error is None for score, error in found.values())
    record = json.loads((whole / "all.json").read_text())
    assert len(record["scores"]) == len(found)
    assert record["tasks"]["package"]["classes"] == 24
    assert set(record["transfer"]) == {"package", "universal (mlm)", "one-shot"}
    assert record["tickets"]["overlaps"]["package"]["package"] == 1
    assert record["tickets"]["overlaps"]["package"]["one-shot"] < 1
    for name, sparsity in record["tickets"]["sparsities"].items():
        assert sparsity == pytest.approx(0.15, abs=1e-4), name
    page = (whole / "report.html").read_text()
    assert page.count("<svg") == 2
    for text in ("Where tickets match", "universal (mlm)", "permuted weights", "Transfer"):
        assert text in page


def test_tickets_are_kept_round_by_round(model, whole):
    setup = Setup(model, whole, 15, 2, 8, 1)
    for source in ("package", "mlm"):
        first, second = (Ticket.load(setup.ticket(source, sparsity)) for sparsity in (10, 15))
        assert (first.source.round, second.source.round) == (1, 2)
        assert first.sparsity == pytest.approx(0.10, abs=1e-4)
        assert second.source.task == source
        # 2 layers of 4 * 32 * 32 + 2 * 32 * 64 weights and the pooler's
        assert sum(layer.size for layer in second.layers) == 2 * 8192 + 1024
    assert setup.rounds_left("mlm") == 0


def test_done_once_it_is_not_done_again(model, whole, monkeypatch, capsys):
    def never(*arguments):
        raise AssertionError("this is done already")

    before = (whole / "runs.jsonl").read_bytes()
    monkeypatch.setattr(command, "run", never)
    monkeypatch.setattr(command, "draw", never)
    assert main(arguments(model, whole, "--permuted")) == 0
    assert (whole / "runs.jsonl").read_bytes() == before
    assert "sparsest matching" in capsys.readouterr().out


def test_processes_give_the_same_figures(model, whole, tmp_path):
    assert main(arguments(model, tmp_path, "--mlm-steps", "0", "--jobs", "2")) == 0
    assert len(found := runs(tmp_path)) == 2 * (1 + 2 * 2 + 2)
    assert found.items() <= runs(whole).items()


def test_a_plan_runs_nothing(model, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "run", None)
    assert main(arguments(model, tmp_path, "--plan")) == 0
    said = capsys.readouterr().out
    assert "1 tasks, 18 runs" in said and "rounds of tickets       4     4" in said
    assert "minutes" in said
    assert runs(tmp_path) == {}
    assert main(arguments(model, whole, "--plan")) == 0
    assert "about 0.0 minutes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "n", "left"), [((command, "run"), 5, 4), ((work, "fit"), 4, 2)], ids=["run", "round"]
)
def test_interrupted_it_goes_on_where_it_was(model, whole, tmp_path, place, n, left, monkeypatch):
    # fit: two dense runs, then the second round of the first ticket
    original, count = getattr(*place), itertools.count(1)

    def dying(*arguments, **keywords):
        if next(count) == n:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    call = arguments(model, tmp_path, "--permuted")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(*place, dying)
        main(call)
    assert len(runs(tmp_path)) == left
    if place[0] is work:
        assert Setup(model, tmp_path, 15, 2, 8, 1).rounds_left("package") == 1
    assert main(call) == 0
    assert runs(tmp_path) == runs(whole)


def test_other_settings_are_other_runs_and_tickets(model, whole):
    setup = Setup(model, whole, 15, 2, 8, 1)
    cell = Cell("package", "iterative", "mlm", 10, 0)
    key = setup.key(cell)
    assert key in runs(whole)
    others = [
        setup.key(dataclasses.replace(cell, seed=7)),
        setup.key(cell, split="val"),
        setup.key(cell, learning_rate=0.1),
        *(
            dataclasses.replace(setup, **{name: 5}).key(cell)
            for name in ("steps", "batch_size", "mlm_steps", "largest")
        ),
    ]
    assert key not in others and len({*others}) == len(others)
    for name in ("mlm_steps", "largest"):
        other = dataclasses.replace(setup, **{name: 20})
        assert other.folder("mlm") != setup.folder("mlm")
        assert other.rounds_left("mlm") == len(other.rounds().rounds())
    assert dataclasses.replace(setup, mlm_steps=5).folder("package") == setup.folder("package")


def test_a_run_under_a_ticket_trains_what_survives_only(model, whole, monkeypatch):
    setup = Setup(model, whole, 15, 2, 8, 1)
    seen = {}

    def fit(network, *arguments, **keywords):
        seen["ticket"] = Ticket.of(network.model)
        return original(network, *arguments, **keywords)

    original = work.fit
    monkeypatch.setattr(work, "fit", fit)
    keys = {
        scheme: setup.key(Cell("package", scheme, source, 15, 0))
        for scheme, source in (("iterative", "package"), ("shuffled", "package"), ("random", ""))
    }
    drawn = Ticket.load(setup.ticket("package", 15))
    done = {}
    for scheme, key in keys.items():
        assert work.run(setup, key).score == runs(whole)[key][0]
        done[scheme] = seen["ticket"]
    assert done["iterative"] == drawn
    assert done["shuffled"] != drawn
    assert [la.kept for la in done["shuffled"].layers] == [la.kept for la in drawn.layers]
    assert done["random"].sparsity == pytest.approx(0.15, abs=1e-4)
    assert [la.kept for la in done["random"].layers] != [la.kept for la in drawn.layers]


def test_a_run_that_diverges_is_a_result(model, whole, monkeypatch):
    def fit(*arguments, **keywords):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(work, "fit", fit)
    setup = Setup(model, whole, 15, 2, 8, 1)
    done = work.run(setup, setup.key(Cell("package", "dense", "", 0, 0)))
    assert (done.score, done.error) == (None, "the loss is nan")


def test_a_process_that_dies_is_told(model, tmp_path, monkeypatch, capsys):
    def dying(*arguments):
        raise BrokenProcessPool

    monkeypatch.setattr(command, "run", dying)
    assert main(arguments(model, tmp_path)) == 1
    assert "goes on where it was" in capsys.readouterr().err


def test_an_encoder_without_berts_head_has_no_universal_ticket(model, tmp_path, capsys):
    config = transformers.DistilBertConfig(vocab_size=500, dim=32, n_layers=1, n_heads=2)
    transformers.DistilBertForMaskedLM(config).save_pretrained(tmp_path / "other")
    Encoder(model).tokenizer.save_pretrained(tmp_path / "other")
    call = arguments(str(tmp_path / "other"), tmp_path / "out")
    assert main(call) == 2
    assert "--mlm-steps 0 leaves the universal ticket out" in capsys.readouterr().err
    assert main([*call, "--mlm-steps", "0", "--plan"]) == 0


def test_tuning(model, tmp_path, capsys):
    assert main(arguments(model, tmp_path, "--tune")) == 0
    found = runs(tmp_path)
    assert {(key.split, key.learning_rate, key.seed) for key in found} == {
        ("val", rate, seed) for rate in (3e-4, 1e-3, 2e-3) for seed in (100, 101)
    }
    assert capsys.readouterr().out.count("taken") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tasks", "nonsense"), "tasks are package, kind, pair, .* got 'nonsense'"),
        (("--sparsities", "25", "30"), "must be those of rounds"),
        (("--transfer-sparsity", "30"), "transfer sparsities must be among"),
        (("--model", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_bad_options(model, tmp_path, capsys, more, said):
    assert main(arguments(model, tmp_path / "out", *more)) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [("--seeds", "0"), ("--jobs", "x"), ("--mlm-steps", "-1")])
def test_options_that_are_none(model, tmp_path, more):
    with pytest.raises(SystemExit):
        main(arguments(model, tmp_path, *more))


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["tickets"]) == 2
    assert "pip install memtl[models,demo]" in capsys.readouterr().err


def test_a_key_is_found_again(tmp_path):
    values = {f.name: {"int": 3, "float": 0.5}.get(f.type, "x") for f in dataclasses.fields(Key)}
    run = Run(Key(**values), 1 / 3, None, 2.0)
    with Journal(tmp_path / "runs.jsonl", Run) as journal:
        journal.add(run)
    with Journal(tmp_path / "runs.jsonl", Run) as journal:
        assert journal.find(Key(**values)) == run and [*journal] == [run]


def test_whatever_the_head_a_ticket_is_about_the_same_weights(model):
    config = TicketConfig(sparsity=0.5)
    found = [
        draw_ticket(Encoder(model).build(head, 2, 0).model, config)
        for head in ("classifier", "regressor", "spans", "mlm")
    ]
    assert "pooler.dense.weight" in found[0].masks
    assert all(ticket == found[0] for ticket in found)


def test_the_seed_decides_what_is_fresh_and_nothing_else(model):
    first, same, other = (
        Encoder(model).build("classifier", 3, seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert [name for name in first if not torch.equal(first[name], other[name])] == [
        "model.classifier.weight"
    ]


def test_another_encoder_has_another_fingerprint(model, tmp_path):
    again = transformers.AutoModelForPreTraining.from_pretrained(model)
    Encoder(model).tokenizer.save_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert Encoder(str(tmp_path)).fingerprint == Encoder(model).fingerprint
    with torch.no_grad():
        again.bert.encoder.layer[1].output.dense.weight[3, 4] += 1e-3
    again.save_pretrained(tmp_path)
    weights = Encoder(str(tmp_path)).fingerprint
    assert weights != Encoder(model).fingerprint
    again.config.attention_probs_dropout_prob = 0.2
    again.save_pretrained(tmp_path)
    assert Encoder(str(tmp_path)).fingerprint not in (weights, Encoder(model).fingerprint)


@pytest.mark.parametrize("name", ["glue:rte", "squad"])
def test_tasks_that_are_downloaded_need_a_library(model, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(arguments(model, tmp_path, "--tasks", name)) == 2
    assert "pip install datasets" in capsys.readouterr().err
