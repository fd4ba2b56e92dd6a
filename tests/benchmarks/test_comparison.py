"""The comparison: entries do what they say, runs go on where they were, the report has it all; and
the released form of Back Razor computes what it should."""

import copy
import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.training.comparison import __main__ as program
from benchmarks.training.comparison import entries, report, runs
from benchmarks.training.comparison.entries import BACKBONES, CHECKPOINTING, FULL, RATES
from benchmarks.training.released_back_razor import apply_released_back_razor, prune, rebuild
from memtl import assets
from memtl.demo.experiments import build
from memtl.memory import saved_bytes
from memtl.training.loop import loss_of, seeded

TINY = {backbone.name: backbone for backbone in runs.QUICK}
TASKS = {"vit": 10, "cnn": 10, "bert": 4}
TRANSFORMERS = ("vit", "bert")


def batch_of(name, samples=2):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(TASKS[name], (samples,), generator=generator)
    if name == "bert":
        return torch.randint(5, 4000, (samples, 9), generator=generator), labels
    return torch.randn(samples, 1, 32, 32, generator=generator), labels


def model_of(name, entry):
    return build(TINY[name].experiment, entry.method, TASKS[name], 0).train()


def gradients(name, entry):
    model = model_of(name, entry)
    with seeded(0):
        loss_of(model, *batch_of(name)).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found and all(g.isfinite().all() for g in found.values())
    return found


@pytest.mark.parametrize("name", TINY)
def test_every_entry_trains_and_computes_the_gradients_it_says(name):
    found = {}
    for entry in entries.entries(TINY[name]):
        found[entry.name] = gradients(name, entry)
        if entry.same_as is not None:
            others = found[entry.same_as]
            assert found[entry.name].keys() == others.keys()
            for parameter, gradient in others.items():
                torch.testing.assert_close(
                    found[entry.name][parameter], gradient, rtol=1e-3, atol=1e-5
                )
    assert {FULL, CHECKPOINTING, "BitFit", *report.RAZORS} <= found.keys()
    assert ("Rep-Net" in found) == (name == "cnn")
    assert ("VQT" in found) == ("LoRA, frozen" in found) == (name in TRANSFORMERS)


def test_what_entries_keep():
    every = {entry.name: entry for entry in entries.entries(TINY["vit"])}
    images, _ = batch_of("vit")
    full, checkpointed, half, products, razor, released = (
        saved_bytes(model_of("vit", every[name]), images)
        for name in (
            FULL,
            CHECKPOINTING,
            "checkpointing, every other",
            "checkpointing but products",
            "Back Razor 0.1",
            "released Back Razor 0.1",
        )
    )
    assert checkpointed < half < full and razor < released < full / 3
    if entries.COUNTED:
        assert checkpointed < products < full


def test_whose_accuracy_is_whose():
    vit, cnn = TINY["vit"], TINY["cnn"]
    by_name = {entry.name: entry for entry in entries.ENTRIES}
    assert by_name[CHECKPOINTING].trained_as(vit) == FULL
    assert by_name[CHECKPOINTING].trained_as(cnn) == CHECKPOINTING  # running statistics differ
    assert by_name["LoRA, frozen"].trained_as(vit) == "LoRA"
    assert all(e.trained_as(vit) == e.name for e in by_name.values() if e.same_as is None)
    assert len({len(rates) for rates in RATES.values()}) == 1  # the same tuning for everyone


def test_steps_to():
    backbone = dataclasses.replace(BACKBONES[0], target=0.5, every=10)
    assert runs.steps_to(backbone, [[0.1, 0.5, 0.4], [0.6]]) == 15
    assert runs.steps_to(backbone, [[0.1, 0.5], [0.2, 0.4]]) is None


def test_program(tmp_path, monkeypatch, capsys):
    """Called twice: the second time it trains and measures nothing but times."""
    monkeypatch.setenv("MEMTL_PROGRESS", "0")
    names = (FULL, CHECKPOINTING, "Back Razor 0.1")
    few = [entry for entry in entries.ENTRIES if entry.name in names]
    monkeypatch.setattr(runs, "entries", lambda backbone: few)
    # Processes are slow to start; one is, in the next test.
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    arguments = ["comparison", "--quick", "--only", "vit", "--seeds", "2"]
    arguments += ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "a.json")]
    arguments += ["--document", str(tmp_path / "docs" / "a.md")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert program.main() == 0
    first = capsys.readouterr().out
    assert first.count("rate ") >= 6 and first.count("seed ") == 4 and first.count("memory") >= 3
    assert program.main() == 0
    again = capsys.readouterr().out
    assert "of validation" not in again and "memory\n" not in again
    record = json.loads((tmp_path / "a.json").read_text())
    (vit,) = record["backbones"]
    full, checkpointed, razor = vit["rows"]
    assert [row["entry"] for row in vit["rows"]] == list(names)
    assert checkpointed["trained_as"] == FULL and checkpointed["test"] == full["test"]
    for row in vit["rows"]:
        assert len(row["test"]) == len(row["curves"]) == 2 and len(row["tuning"]) == 3
        assert row["learning_rate"] in RATES["whole"]
        assert row["seconds_to_target"] == row["steps_to_target"] * row["seconds_per_step"] > 0
    assert razor["saved_bytes_per_sample"] < full["saved_bytes_per_sample"] / 5
    text = (tmp_path / "docs" / "a.md").read_text()
    assert "Vision transformer" in text and "| Back Razor 0.1 |" in text
    plots = sorted(path.name for path in (tmp_path / "docs").glob("*.svg"))
    assert plots == ["comparison-vit-accuracy.svg", "comparison-vit-time.svg"]
    assert all(f"({name})" in text for name in plots)
    assert all((tmp_path / "docs" / name).stat().st_size < 150_000 for name in plots)
    (tmp_path / "docs" / "a.md").unlink()
    monkeypatch.setattr(runs, "measure", None)  # of what is there already
    monkeypatch.setattr(sys, "argv", [*arguments, "--render"])
    assert program.main() == 0 and (tmp_path / "docs" / "a.md").read_text() == text
    assert {"commit", "torch", "threads", "load_average", "command"} <= record.keys()


def test_footprint_of_a_fresh_process(tmp_path):
    said = []
    with runs.Journal(tmp_path / "footprints.jsonl", runs.Footprint) as journal:
        study = runs._Study(TINY["vit"], None, None, journal, said.append)
        found = study.footprint(entries.ENTRIES[0])
        assert study.footprint(entries.ENTRIES[0]) is found and len(said) == 1
    model = model_of("vit", entries.ENTRIES[0])
    assert found.trainable == sum(p.numel() for p in model.parameters())
    assert found.saved_bytes > 4 * saved_bytes(model, batch_of("vit", 4)[0]) / 5
    assert found.peak_bytes is None or found.peak_bytes > found.saved_bytes / 2


def test_a_diverged_rate_is_not_taken(tmp_path, monkeypatch):
    def train(experiment, task, method, *, learning_rate, **options):
        if learning_rate != RATES["whole"][0]:
            raise FloatingPointError("the loss is nan")
        return 0.5, 0.5, ()

    monkeypatch.setattr(runs, "train", train)
    with runs.Journal(tmp_path / "runs.jsonl", runs.Run) as journal:
        study = runs._Study(TINY["vit"], TINY["vit"].load_task(), journal, None, lambda line: None)
        rate, scores = study.tuned(entries.ENTRIES[0])
    assert rate == RATES["whole"][0] and sorted(scores.values()) == [0.0, 0.0, 0.5]


def test_verdict():
    rows = [
        {"entry": CHECKPOINTING, "peak_bytes": 100, "seconds_per_step": 2.0},
        {"entry": "Back Razor 0.1", "peak_bytes": 80, "seconds_per_step": 1.0},
    ]
    assert report.verdict({"rows": rows}) == (
        f"Back Razor 0.1 against {CHECKPOINTING}: peak 0.80x, step 0.50x"
    )


@pytest.mark.parametrize("keep", [0.03, 0.1, 0.5, 1.0])
def test_released_prune(keep):
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    values, bitmap = prune(x, keep, torch.float32)
    pruned = min(max(int(35 * (1 - keep)), 1), 35)
    assert len(values) == 3 * (35 - pruned + 1) and len(bitmap) == -(-105 // 8)
    back = rebuild(values, bitmap, x.shape)
    for sample, kept in zip(x.flatten(1), back.flatten(1), strict=True):
        threshold = sample.abs().kthvalue(pruned).values
        assert torch.equal(kept, torch.where(sample.abs() >= threshold, sample, 0.0))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_released_back_razor_is_exact_where_nothing_is_pruned(name):
    loaded = assets.load("vit_glyphs", 10) if name == "vit" else assets.load_encoder(num_classes=4)
    stock = loaded.eval()  # without dropout, whose random numbers are others
    ours = copy.deepcopy(stock)
    apply_released_back_razor(ours, keep=1.0)
    inputs, labels = batch_of(name)
    outputs = [model(inputs) for model in (stock, ours)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        F.cross_entropy(output, labels).backward()
    for (parameter, a), b in zip(stock.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None and a.grad.norm() > 1e-6:  # keys' biases have none but rounding
            assert F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), 0) > 0.999, parameter


def test_released_attention_drops_what_it_says():
    """Under dropout the gradient is that of the very mask that the forward drew."""
    q, k, v = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    model = torch.nn.Module()
    model.forward = lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    apply_released_back_razor(model, keep=1.0)
    out = model()
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    probabilities = (q @ k.mT / 2).softmax(-1)
    # v enters linearly: out = p v, and its gradient is p^T w, of the same dropped p
    w = torch.arange(out.numel(), dtype=out.dtype).view_as(out)
    torch.testing.assert_close((v.grad * v).sum(), (out * w).sum(), rtol=2e-3, atol=1e-2)
    assert not torch.allclose(out, probabilities @ v)


def test_released_back_razor_is_for_encoders():
    model = torch.nn.Module()
    x = torch.randn(1, 2, 3, 4)
    model.forward = lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True)
    apply_released_back_razor(model)
    with pytest.raises(ValueError, match="is_causal must be False"):
        model()
