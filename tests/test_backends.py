"""Who serves an operator, and what is said when something cannot be loaded."""

import os
import subprocess
import sys

import pytest
import torch

from memtl import _ops, backends, reference

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "memtl._C":
            raise ModuleNotFoundError("No module named 'memtl._C'", name="memtl._C")
sys.meta_path.insert(0, Blocked())
"""
USE = """
import torch, memtl
x = torch.randn(4, 300, requires_grad=True)
w = torch.randn(5, 300, requires_grad=True)
memtl.functional.linear(x, w).sum().backward()
memtl.functional.gelu(x).sum().backward()
print("owner", memtl.backends.owner("topk_pack", "cpu"), w.grad.shape)
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_every_operator_has_a_reference_and_an_owner():
    assert set(reference.OPS) == set(_ops.NAMES)
    for op in _ops.NAMES:
        for device in ("cpu", "cuda", "mps"):
            assert backends.owner(op, device) in {
                "native-cpu", "native-cuda", "triton", "reference",
            }  # fmt: skip
        assert backends.owner(op, "mps") == "reference"


def test_the_owner_is_the_kernel_that_the_dispatcher_has():
    for op in _ops.NAMES:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"memtl::{op}", "CPU")
        assert has == (backends.owner(op, "cpu") == "native-cpu")


def test_the_report_names_every_operator_and_every_backend():
    text = backends.report()
    for op in _ops.NAMES:
        assert op in text
    for backend in backends.status():
        assert backend.name in text and backend.detail in text
    assert torch.__version__ in text


def test_the_reference_alone():
    done = run(USE, MEMTL_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("owner reference")
    assert "RuntimeWarning" not in done.stderr  # it was asked for


def test_an_unknown_backend():
    done = run("import memtl", MEMTL_BACKEND="nonsense")
    assert done.returncode != 0
    assert "BackendUnavailable: MEMTL_BACKEND must be one of" in done.stderr
    assert "'nonsense'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for it here")
def test_triton_without_a_gpu_says_what_helps():
    done = run("import memtl", MEMTL_BACKEND="triton", TRITON_INTERPRET="0")
    assert done.returncode != 0
    assert "MEMTL_BACKEND=triton cannot be used" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_without_native_kernels_it_works_and_says_so_once():
    code = BLOCKED + USE + "import importlib; importlib.import_module('memtl.functional')"
    done = run(code, MEMTL_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("owner reference")
    assert done.stderr.count("CPU operators run on the PyTorch reference") == 1
    assert "memtl doctor" in done.stderr


def test_native_asked_for_by_name_but_absent():
    code = BLOCKED + (
        "import pathlib; glob = pathlib.Path.glob\n"
        "pathlib.Path.glob = lambda self, p: iter(()) if '_C_cuda' in p else glob(self, p)\n"
        "import memtl"
    )
    done = run(code, MEMTL_BACKEND="native")
    assert done.returncode != 0
    assert "MEMTL_BACKEND=native cannot be used: native-cpu:" in done.stderr


def test_an_operator_that_triton_computes_faster():
    pytest.importorskip("triton")
    code = (
        "import memtl; from memtl import backends\n"
        "from memtl import kernels\n"
        "backends.TRITON_FIRST = frozenset({'bits_apply'})\n"
        "before = {op: backends.owner(op, 'cuda') for op in kernels.OPS}\n"
        "assert backends._load_triton('cuda')\n"
        "for op in kernels.OPS:\n"
        "    native = before[op] == 'native-cuda' and op != 'bits_apply'\n"
        "    assert backends.owner(op, 'cuda') == ('native-cuda' if native else 'triton'), op\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
