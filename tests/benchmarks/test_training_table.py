"""The benchmark of training steps: a step trains, the modes are what they say, the program."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memtl
from benchmarks.kernels import harness
from benchmarks.training import table
from benchmarks.training.steps import format_rows, in_a_child, make_step, measure
from benchmarks.training.workloads import (
    CHECKPOINTING,
    FORWARD,
    FROZEN_MODES,
    MODES,
    QUICK_PAIRS,
    STOCK,
    TICKET_MODES,
    WORKLOADS,
    Mode,
    Workload,
)
from memtl.memory import saved_bytes
from memtl.methods.tickets import state_bytes

pytest.importorskip("timm")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
IMAGES = Workload("vit_tiny_patch16_224", 1, options={"depth": 2, "embed_dim": 48})
TEXTS = Workload("hf:bert", 2, tokens=16, options=TEXT)
SMALL = [IMAGES, TEXTS]


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.model)
def test_a_step_trains_and_leaves_no_gradients(workload):
    models = []

    class Watched(Mode):
        def prepare(self, model):
            super().prepare(model)
            models.append(model)

    step = make_step(workload, Watched("stock"), "cpu")
    before = [p.detach().clone() for p in models[0].parameters()]
    first = step.forward().item()
    for _ in range(5):
        step.run()
    assert all(p.grad is None for p in models[0].parameters())
    changed = sum(
        not torch.equal(a, b) for a, b in zip(before, models[0].parameters(), strict=True)
    )
    assert changed == len(before)
    assert step.forward().item() < first
    assert step.gradient_bytes == sum(p.nbytes for p in before)


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.model)
def test_every_mode_starts_from_the_same_loss(workload):
    losses, saved = {}, {}
    for mode in MODES:
        step = make_step(workload, mode, "cpu")
        torch.manual_seed(0)
        losses[mode.name] = step.forward().item()
        saved[mode.name] = saved_bytes(step.forward)
    assert len(set(losses.values())) == 1
    stock = saved.pop("stock")
    assert all(count < stock / 2 for count in saved.values())
    assert saved["fast, keep 0.03"] < saved["fast, keep 0.1"]


def test_channels_last():
    workload = Workload("mobilenetv2_035", 2, channels_last=True)
    assert workload.title == "mobilenetv2_035, channels last"
    model = workload.build()
    images, _ = workload.batch_of(model, "cpu")
    for t in (images, model.get_parameter("conv_stem.weight"), model.forward_features(images)):
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.title)
def test_checkpointing_is_on_in_every_model(workload):
    """Of the models as they are, on one sample: their own switch has to do something."""
    small = Workload(workload.model, 2, tokens=8, options=TEXT if workload.is_text else {})
    stock, checkpointed = (
        saved_bytes(make_step(small, mode, "cpu").forward) for mode in (STOCK, CHECKPOINTING)
    )
    assert checkpointed < stock / 2


def test_released_vqt_computes_what_ours_does():
    ours, released = (
        next(mode for mode in FROZEN_MODES if mode.name == name)
        for name in ("VQT, 1 query", "VQT as released")
    )
    torch.manual_seed(0)
    a = IMAGES.build()
    x, _ = IMAGES.batch_of(a, "cpu")
    b = copy.deepcopy(a)
    ours.prepare(a)
    released.prepare(b)
    a.head.dropout = 0.0
    with torch.no_grad():
        b.prompts.copy_(a.head.queries)
        b.head.weight.copy_(a.head.linear.weight)
        b.head.bias.copy_(a.head.linear.bias)
    expected = b(x)
    torch.testing.assert_close(a(x), expected)
    grads = [
        torch.autograd.grad(y.logsumexp(1).sum(), p)
        for y, p in ((a(x), a.head.queries), (expected, b.prompts))
    ]
    torch.testing.assert_close(*grads)
    saved = [saved_bytes(lambda m: m(x).logsumexp(1).sum(), m) for m in (a, b)]
    assert saved[0] < saved[1] / 5


def test_what_a_child_returns_and_that_it_failed(capfd):
    parent = os.getpid()
    assert in_a_child(lambda: (os.getpid() != parent, "made")) == (True, "made")

    def fails():
        raise ValueError("no such thing")

    with pytest.raises(RuntimeError, match="ended without a result"):
        in_a_child(fails)
    assert "no such thing" in capfd.readouterr().err


def test_rows(monkeypatch):
    times = {"stock": 2.0, "checkpointing": 3.0}
    monkeypatch.setattr(harness, "interleaved_medians", lambda calls, timer, seconds: times)
    modes = (STOCK, CHECKPOINTING)
    images, rows = measure([(IMAGES, modes), (TEXTS, modes)], "cpu", harness.cpu_timer, 0.0)
    assert {row["model"] for row in images} == {IMAGES.model}
    assert [row["mode"] for row in rows] == ["stock", "checkpointing"]
    assert [row["relative_time"] for row in rows] == [1.0, 1.5]
    expected = saved_bytes(make_step(TEXTS, STOCK, "cpu").forward) / 2
    assert rows[0]["saved_bytes_per_sample"] == expected
    text = format_rows(rows, "float32")
    assert "hf:bert, batch 2, float32" in text and "1.50x" in text
    assert text.count("n/a") == sum(row["peak_bytes"] is None for row in rows)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/training/table.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_program(tmp_path):
    output = tmp_path / "training.json"
    done = run("--quick", "--unchecked", f"--output={output}")
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["unchecked"] is True and record["seed"] == 0 and record["threads"] == 1
    found = [(row["model"], row["mode"]) for row in record["rows"]]
    assert found == [
        (workload.title, mode.name) for workload, modes in QUICK_PAIRS for mode in modes
    ]
    for row in record["rows"]:
        forward_only = row["mode"] == FORWARD.name
        assert row["seconds"] > 0 and (row["saved_bytes_per_sample"] > 0) != forward_only
        assert row["mode"] in done.stdout


def test_program_refuses_where_a_test_fails(tmp_path, monkeypatch, capsys):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it():\n    assert False\n")
    output = tmp_path / "training.json"
    monkeypatch.setattr(table, "TESTS", (str(failing),))
    monkeypatch.setattr(sys, "argv", ["table.py", "--quick", f"--output={output}"])
    assert table.main() == 1
    assert "nothing is measured" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads=0"], "must be at least 1, got 0"),
        (["--only=nothing"], "invalid choice"),
        (["--only=resnet50", "--quick"], "leave --only out"),
    ],
)
def test_program_refuses_what_it_cannot_do(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table.py", *arguments])
    with pytest.raises(SystemExit):
        table.main()
    assert message in capsys.readouterr().err


def test_a_ticket_is_trained_with_the_state_of_survivors():
    sizes = {}
    for mode in TICKET_MODES:
        step = make_step(TEXTS, mode, "cpu")
        first = step.forward().item()
        step.run()
        assert step.forward().item() != first
        sizes[mode.name] = state_bytes(step.optimizer)
    assert sizes["ticket 90 %"] == sizes["stock"]
    model = TEXTS.build()
    pruned = memtl.draw_ticket(model, memtl.TicketConfig(sparsity=0.9)).apply(model).pruned
    assert sizes["stock"] - sizes["ticket 90 %, compact"] == 8 * pruned
