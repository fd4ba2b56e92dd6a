"""memtl.save under kills, a disk that fails, and other processes that save to the same folder."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import memtl
from memtl.methods.base import folder
from tests.helpers import python

START = """
import os, signal, sys
from pathlib import Path

import torch
from torch import nn

import memtl

torch.set_num_threads(1)
os.fsync = lambda handle: None  # a kill loses nothing of what was written
folder = Path(os.environ["FOLDER"])


def network(value=None):
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU())
    if value is not None:
        memtl.apply(model, memtl.BackRazorConfig())
        nn.init.constant_(model[0].weight, value)
        nn.init.constant_(model[0].bias, value)
    return model


def saved():
    model = network()
    memtl.load(model, folder)
    assert (model[0].weight == model[0].bias[0]).all(), "of two saves"
    return model[0].bias[0].item()


def forked(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child
"""

KILLED = """
OURS = tuple(str(Path(memtl.__file__).parent / f) for f in ("files.py", "methods/base/folder.py"))


def save_until(line):
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    model = network(2.0)
    sys.settrace(trace)
    memtl.save(model, folder)


memtl.save(network(1.0), folder)
seen, line = [], 0
while True:
    status = os.waitpid(forked(lambda: save_until(line)), 0)[1]
    seen.append(saved())
    if not os.WIFSIGNALED(status):
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = len(os.listdir(folder))
    memtl.save(network(1.0), folder)
    assert len(os.listdir(folder)) == 3, os.listdir(folder)
    line += 1
    if left > 3:
        print("left")
assert seen == sorted(seen), seen  # the old one up to a point, the new one from there on
print(seen.count(1.0), seen.count(2.0))

import safetensors.torch

whole = safetensors.torch.save_file


def half(tensors, path):
    whole(tensors, path)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def save_half():
    safetensors.torch.save_file = half
    memtl.save(network(3.0), folder)


memtl.save(network(1.0), folder)
assert os.WIFSIGNALED(os.waitpid(forked(save_half), 0)[1])
assert saved() == 1.0
assert len(os.listdir(folder)) == 4
memtl.save(network(3.0), folder)
assert saved() == 3.0
assert len(os.listdir(folder)) == 3
"""

TOGETHER = """
def work(first):
    for i in range(20):
        memtl.save(network(first + 2.0 * i), folder)


memtl.save(network(0.0), folder)
children = [forked(lambda: work(1.0)), forked(lambda: work(2.0))]
while children:
    value = saved()
    assert 0 <= value <= 40 and value == int(value)
    done, status = os.waitpid(-1, os.WNOHANG)
    assert status == 0, status
    if done:
        children.remove(done)
assert saved() in (39.0, 40.0)
assert len(os.listdir(folder)) == 3
"""


def run(script, directory):
    """The lines that a process of its own, which forks, prints."""
    done = python(START + script, FOLDER=str(directory), PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_kill_at_any_line_leaves_a_whole_save(tmp_path):
    *left, counts = run(KILLED, tmp_path / "save")
    old, new = map(int, counts.split())
    assert old > 30 and new > 5
    assert len(left) > 10  # and the next save deletes what was left


def test_two_processes_save_to_one_folder(tmp_path):
    run(TOGETHER, tmp_path / "save")


def network():
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU())
    memtl.apply(model, memtl.BackRazorConfig())
    return model


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_disk_that_fails_leaves_a_whole_save(tmp_path, monkeypatch, call):
    model = network()
    memtl.save(model, tmp_path)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    own, results = getattr(os, call), []
    for failing in range(8):
        calls = []

        def fails(*args, calls=calls, failing=failing):
            calls.append(args)
            if len(calls) == failing + 1:
                raise OSError(28, "No space left on device")
            return own(*args)

        monkeypatch.setattr(os, call, fails)
        try:
            memtl.save(model, tmp_path)
        except OSError as error:
            assert error.errno == 28
        finally:
            monkeypatch.undo()
        fresh = nn.Sequential(nn.Linear(4, 3), nn.GELU())
        memtl.load(fresh, tmp_path)
        results.append(torch.equal(fresh[0].weight, model[0].weight))
        assert results[-1] or torch.equal(fresh[0].weight, before)
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert results == sorted(results) and not results[0] and results[-1]


def test_without_locks_the_save_before_is_deleted_alone(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / "weights-0123456789ab.safetensors").write_bytes(b"about to be named by another")
    model = network()
    memtl.save(model, tmp_path)
    with torch.no_grad():
        model[0].weight.add_(1)
    memtl.save(model, tmp_path)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) == 2
    monkeypatch.undo()
    memtl.save(model, tmp_path)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) == 1


def test_a_save_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    model = network()
    memtl.save(model, tmp_path)
    own = folder.sha256_of

    def replaced(path):
        digest = own(path)
        monkeypatch.undo()
        with torch.no_grad():
            model[0].weight.add_(1)
        memtl.save(model, tmp_path)
        assert not path.exists()
        return digest

    monkeypatch.setattr(folder, "sha256_of", replaced)
    fresh = nn.Sequential(nn.Linear(4, 3), nn.GELU())
    memtl.load(fresh, tmp_path)
    assert torch.equal(fresh[0].weight, model[0].weight)
