"""Checkpoints: what is written, what is kept, what a damage or a failure leaves."""

from __future__ import annotations

import json
import os

import pytest
import torch

from memtl.runs.state import POINTER, Checkpoints


def save(there: Checkpoints, step: int, best: bool = False) -> None:
    tensors = {"model/w": torch.full((3,), float(step)), "optimizer/w/step": torch.tensor(1.0)}
    there.save(step, tensors, {"number": step}, best=best)


def files(there: Checkpoints) -> list[int]:
    """Steps of the checkpoints in the folder, and nothing else is there."""
    names = sorted(p.name for p in there.folder.iterdir() if p.name != POINTER)
    assert all(name.startswith("step-") for name in names)
    return [int(name.split("-")[1]) for name in names]


def test_the_latest_and_the_best_stay(tmp_path):
    there = Checkpoints(tmp_path / "c")
    assert there.latest() is None and there.best() is None
    for step in (1, 2, 3, 4, 5):
        save(there, step, best=step == 2)
    assert files(there) == [2, 4, 5]
    again = Checkpoints(tmp_path / "c")
    found = again.latest()
    assert found.step == 5 and found.facts == {"number": 5}
    assert torch.equal(found.under("model")["w"], torch.full((3,), 5.0))
    assert found.under("optimizer").keys() == {"w/step"}
    assert again.best().step == 2
    one = Checkpoints(tmp_path / "c", keep=1)
    save(one, 6)
    assert files(one) == [2, 6]
    one.clear()
    assert files(one) == [] and Checkpoints(tmp_path / "c").latest() is None


def test_tensors_that_share_memory_or_lie_otherwise(tmp_path):
    t = torch.randn(4, 6)
    given = {"a": t, "b": t, "part": t[1:3], "turned": t.t(), "none": t[:0], "one": t[0, 0]}
    there = Checkpoints(tmp_path)
    there.save(1, given, {}, best=True)
    for name, tensor in there.latest().tensors.items():
        assert torch.equal(tensor, given[name])


def test_a_damaged_one_is_passed_over(tmp_path):
    there = Checkpoints(tmp_path)
    save(there, 1)
    save(there, 2)
    newest = max(tmp_path.glob("step-*"))
    content = newest.read_bytes()
    for damaged in (content[:-1], content[:40], b"", content[:-1] + bytes([content[-1] ^ 1])):
        newest.write_bytes(damaged)
        again = Checkpoints(tmp_path)
        assert again.latest().step == 1 and again.damaged == [newest]
    newest.unlink()
    assert Checkpoints(tmp_path).latest().step == 1
    for path in tmp_path.glob("step-*"):
        path.unlink()
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged or missing"):
        Checkpoints(tmp_path).latest()


def test_a_damaged_best_is_an_error(tmp_path):
    there = Checkpoints(tmp_path)
    save(there, 1, best=True)
    next(tmp_path.glob("step-*")).write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or missing"):
        Checkpoints(tmp_path).best()


@pytest.mark.parametrize("text", ["", "[]", '{"checkpoints": [1], "best": null}'])
def test_a_damaged_pointer_is_an_error(text, tmp_path):
    (tmp_path / POINTER).write_text(text)
    with pytest.raises(ValueError, match=r"latest.json is damaged"):
        Checkpoints(tmp_path)


@pytest.mark.parametrize("call", range(4))
def test_a_save_that_fails_anywhere_leaves_what_was_there(call, tmp_path, monkeypatch):
    there = Checkpoints(tmp_path)
    save(there, 1)
    save(there, 2)
    calls = []

    def fail(*arguments, original):
        calls.append(arguments)
        if len(calls) > call:
            raise OSError("no space left on device")
        return original(*arguments)

    for name in ("replace", "fsync"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, original=original: fail(*a, original=original))
    with pytest.raises(OSError, match="no space"):
        save(there, 3)
    monkeypatch.undo()
    again = Checkpoints(tmp_path)
    assert again.latest().step == 2 and not again.damaged
    save(again, 3)
    assert files(again) == [2, 3]


def test_halves_of_a_killed_process_go(tmp_path):
    there = Checkpoints(tmp_path)
    save(there, 1)
    (tmp_path / ".new.safetensors.123").write_bytes(b"half")
    (tmp_path / "new.safetensors").write_bytes(b"not named yet")
    (tmp_path / "step-00000009-0123456789ab.safetensors").write_bytes(b"not pointed at yet")
    (tmp_path / "mine.txt").write_text("not memtl's")
    save(there, 2)
    record = json.loads((tmp_path / POINTER).read_text())
    assert {p.name for p in tmp_path.iterdir()} == {
        POINTER, "mine.txt", *(entry["file"] for entry in record["checkpoints"]),
    }  # fmt: skip
