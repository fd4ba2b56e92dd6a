"""memtl._C's own face: the build, and which instruction set is in use."""

import os
import subprocess
import sys

import pytest
import torch

import memtl

native = pytest.importorskip("memtl._C", reason="memtl was installed without native kernels")


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def test_build_info():
    info = native.build_info()
    assert info["version"] == memtl.__version__
    assert info["torch_target_version"] == 0x020B000000000000
    assert info["cxx_standard"] >= 202002
    assert "-O3" in info["flags"] and "-ffp-contract=off" in info["flags"]
    assert "fast-math" not in info["flags"]
    assert info["compiler"] and info["torch"]
    assert set(native.isas()) <= set(info["isas"])


def test_best_isa_is_the_default():
    env = {k: v for k, v in os.environ.items() if k != "MEMTL_ISA"}
    code = "import memtl._C as c; print(c.isa(), c.isas()[-1])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    chosen, best = done.stdout.split()
    assert chosen == best


def test_isa_from_the_environment():
    for name in native.isas():
        assert run("import memtl._C as c; print(c.isa())", MEMTL_ISA=name).stdout.split() == [name]


def test_unknown_isa_in_the_environment():
    done = run("import memtl", MEMTL_ISA="sse9")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    said = "MEMTL_ISA=sse9: expected portable, avx2 or avx512, got 'sse9'"
    assert last == f"memtl.backends.BackendUnavailable: {said}"


def test_set_isa_refuses_the_unknown(isa):
    with pytest.raises(ValueError, match="expected portable, avx2 or avx512, got 'neon'"):
        native.set_isa("neon")
    assert native.isa() == isa


def test_set_isa_refuses_what_the_machine_lacks():
    lacking = {"portable", "avx2", "avx512"} - set(native.isas())
    if not lacking:
        pytest.skip("this machine runs every instruction set")
    for name in lacking:
        with pytest.raises(ValueError, match=f"instruction set {name}.*; usable here: "):
            native.set_isa(name)


def test_threads_are_those_of_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert native.num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert native.num_threads() == before


def test_cuda_library_loads_without_a_gpu():
    done = run(
        "import pathlib, torch, memtl, memtl._ops\n"
        "library = pathlib.Path(memtl.__file__).with_name('_C_cuda.abi3.so')\n"
        "print(library.exists())\n"
        "if library.exists():\n"
        "    torch.ops.load_library(library)\n"
        "    key = 'memtl::bits_apply', 'CUDA'\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(*key)\n"
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.split() == ["False"]:
        pytest.skip("the CUDA kernels were not built")
