"""A run in this process: what it leaves, that it goes on exactly, and what its settings do."""

from __future__ import annotations

import json
import random

import numpy
import pytest
import torch
from safetensors.torch import load_file

import memtl
from memtl import runs
from memtl.methods import applied
from memtl.runs import folder
from memtl.runs.average import Average
from memtl.runs.records import JSONL, rows
from tests.runs import small


class Crash(Exception):
    """What ends a process somewhere."""


def train(out, *, crash: int | None = None, fresh: bool = False, norm=True, dropout=0.2, **fields):
    """A run; it may crash when the score after that step is said."""

    def say(line: str) -> None:
        if crash is not None and line.startswith(f"step {crash}:"):
            raise Crash

    settings = small.settings(**fields)
    model = small.network(norm, dropout)
    return runs.train(settings, out, model=model, data=small.data(), fresh=fresh, say=say)


def curve(out) -> list[dict]:
    times = ("seconds", "samples_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in rows(out / JSONL)]


def losses(out) -> list[float]:
    return [row["loss"] for row in rows(out / JSONL) if "loss" in row]


def weights(out) -> dict[str, torch.Tensor]:
    return load_file(out / folder.WEIGHTS)


def test_what_a_run_leaves(tmp_path):
    summary = train(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {*folder.FILES, folder.CHECKPOINTS}
    assert json.loads((tmp_path / folder.SUMMARY).read_text()) == summary
    assert summary["val_score"] > 0.6 and summary["test_score"] > 0.6
    assert summary["classes"] == ["dark", "middle", "bright"]
    assert summary["trained_parameters"] == sum(p.numel() for p in small.network().parameters())
    assert summary["saved_bytes_per_sample"] > 100 and summary["seconds_per_step"] > 0
    found = list(rows(tmp_path / JSONL))
    assert [row["step"] for row in found if "loss" in row] == list(range(1, 13))
    scores = {row["step"]: row["val_accuracy"] for row in found if "val_accuracy" in row}
    assert scores.keys() == {4, 8, 12} and scores[summary["best_step"]] == summary["val_score"]
    assert summary["val_score"] == max(scores.values())
    model = runs.load(tmp_path, model=small.network(seed=1))
    assert not model.training
    for name, t in model.state_dict().items():
        assert torch.equal(t, weights(tmp_path)[name])
    for split, score in (("val", "val_score"), ("test", "test_score")):
        found = runs.evaluate(tmp_path, split=split, model=small.network(), data=small.data())
        assert found["accuracy"] == summary[score]
    latest = runs.evaluate(tmp_path, which="latest", model=small.network(), data=small.data())
    assert latest["step"] == 12 and latest["split"] == "test"


VARIANTS = {
    "full": {},
    "sgd": {"optimizer": "sgd", "clip_norm": 0.5, "label_smoothing": 0.1},
    "average": {"ema": 0.8},
    "bf16": {"precision": "bf16", "accumulate": 2},
    "fp16": {"precision": "fp16", "channels_last": True},
    "back razor": {"method": "back-razor"},
    "frozen, few bits": {"method": [{"method": "low_bit", "bits": 2}], "workers": 1},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_run_that_crashed_goes_on_bit_for_bit(fields, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wanted = train(whole, **fields)
    for step in (4, 8):  # said before it is saved, so the checkpoint is two steps older
        with pytest.raises(Crash):
            train(cut, crash=step, **fields)
    found = train(cut, **fields)
    assert curve(cut) == curve(whole) and len(losses(cut)) == 12
    for name, t in weights(whole).items():
        assert torch.equal(weights(cut)[name], t), name
    assert found["test_score"] == wanted["test_score"]


def test_evaluations_do_not_change_what_follows(tmp_path):
    train(tmp_path / "few", eval_every=12)
    train(tmp_path / "many", eval_every=1)
    assert losses(tmp_path / "few") == losses(tmp_path / "many")


def test_the_seed_decides_and_nothing_else(tmp_path):
    train(tmp_path / "a")
    torch.rand(3), random.random(), numpy.random.rand()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    train(tmp_path / "b", workers=1)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert numpy.array_equal(numpy.random.get_state()[1], states[2][1])
    train(tmp_path / "c", seed=1)
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_parts_of_a_step_are_a_larger_batch(tmp_path):
    """Up to the rounding of sums, where no batch norm sees a part for itself."""
    one = {"norm": False, "dropout": 0.0, "learning_rate": 1e-3}
    train(tmp_path / "whole", batch_size=8, **one)
    train(tmp_path / "parts", batch_size=2, accumulate=4, **one)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert losses(tmp_path / "parts") != losses(tmp_path / "whole")


def test_precision_is_that_of_the_forward(tmp_path):
    train(tmp_path / "fp32")
    for precision in ("bf16", "fp16"):
        train(tmp_path / precision, precision=precision)
        assert losses(tmp_path / precision) != losses(tmp_path / "fp32")
        assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "fp32"), rel=0.2)
        assert weights(tmp_path / precision)["0.weight"].dtype == torch.float32


def test_a_finished_run_is_not_begun_again(tmp_path):
    summary = train(tmp_path)
    before = (tmp_path / JSONL).read_bytes()
    assert train(tmp_path) == summary and (tmp_path / JSONL).read_bytes() == before


def test_another_run_in_the_folder_is_an_error(tmp_path):
    train(tmp_path, steps=4)
    wanted = "in which batch_size is 8, not 4.*seed too.*--out.*--fresh"
    with pytest.raises(ValueError, match=wanted):
        train(tmp_path, steps=4, batch_size=4, seed=2)
    with pytest.raises(ValueError, match="method is .*'back_razor'"):
        train(tmp_path, steps=4, method="back-razor")
    assert train(tmp_path, steps=4, batch_size=4, seed=2, fresh=True)["settings"]["seed"] == 2
    assert [row["step"] for row in rows(tmp_path / JSONL)] == [1, 2, 3, 4, 4]


def test_other_data_in_the_folder_is_an_error(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, crash=8)
    with pytest.raises(ValueError, match="a run on 30 samples of training data, not on 31"):
        runs.train(small.settings(), tmp_path, model=small.network(), data=small.data(31), say=None)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    with pytest.raises(Crash):
        train(cut, crash=8)
    newest = max((cut / folder.CHECKPOINTS).glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:-7])
    train(cut)
    assert curve(cut) == curve(whole)


def test_a_folder_that_is_in_use(tmp_path):
    with folder.held(tmp_path), pytest.raises(ValueError, match="another run is at work in"):
        train(tmp_path)


def test_no_folder_of_a_run(tmp_path):
    for call in (runs.load, runs.evaluate):
        with pytest.raises(ValueError, match="is no run's folder: it has no run.yaml"):
            call(tmp_path)
    with pytest.raises(Crash):
        train(tmp_path, crash=4, save_every=12)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        runs.load(tmp_path, model=small.network())


def test_what_does_not_fit_the_run(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(ValueError, match="the weights of .* do not fit this model"):
        runs.load(tmp_path, model=small.network(norm=False))
    with pytest.raises(ValueError, match="which must be one of"):
        runs.load(tmp_path, which="last", model=small.network())
    other = small.Data(small.Blobs(3, 0), small.Blobs(3, 0), classes=("a", "b", "c", "d"))
    with pytest.raises(
        ValueError, match=r"of the data \(a, b, c and 1 more\) must be those of the model"
    ):
        runs.evaluate(tmp_path, model=small.network(), data=other)
    with pytest.raises(ValueError, match="no split 'test'"):
        runs.evaluate(tmp_path, model=small.network(), data=small.data(test=0), split="test")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = small.network()
    with torch.no_grad():
        model[-1].weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1 of 12"):
        runs.train(small.settings(), tmp_path, model=model, data=small.data(), say=None)


def test_checkpointing_that_a_model_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="checkpointing: a Sequential has neither"):
        train(tmp_path, checkpointing=True)


def test_the_method_is_applied_and_comes_back(tmp_path):
    stock, razor = (
        train(tmp_path / name, method=name, dropout=0.0) for name in ("full", "back-razor")
    )
    assert razor["saved_bytes_per_sample"] < stock["saved_bytes_per_sample"]
    assert razor["method"] == "back_razor"
    model = runs.load(tmp_path / "back-razor", model=small.network())
    assert applied(model) == (memtl.BackRazorConfig(),)


def test_a_compiled_run_saves_the_names_of_the_model(tmp_path, monkeypatch):
    calls = []
    compiled = torch.nn.Module.compile

    def compile(self):  # without the C++ compiler, which takes a minute
        calls.append(self)
        compiled(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    with pytest.raises(Crash):
        train(tmp_path / "compiled", compile=True, crash=8)
    train(tmp_path / "compiled", compile=True)
    train(tmp_path / "plain")
    assert len(calls) == 2
    assert weights(tmp_path / "compiled").keys() == small.network().state_dict().keys()
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_the_average(tmp_path):
    model = small.network()
    average = Average(model, 0.75)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for t in (*model.parameters(), model[1].running_mean):
            t.add_(1)
    average.update(1000)
    for name, t in average.tensors.items():
        moved = model.state_dict()[name] - start[name]
        torch.testing.assert_close(t, start[name] + 0.25 * moved)
    assert "1.num_batches_tracked" not in average.tensors
    own = {name: t.clone() for name, t in model.state_dict().items()}
    with average.inside():
        assert torch.equal(model[0].weight, average.tensors["0.weight"])
    assert all(torch.equal(own[name], t) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="does not fit this model"):
        average.load({"0.weight": torch.ones(1)})
