"""The CUDA library as it was built: code for every architecture asked for, and of every kernel what
it takes of a multiprocessor; no GPU is needed to read that."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import memtl

LIBRARY = Path(memtl.__file__).with_name("_C_cuda.abi3.so")
REGISTERS = 65536
"""Of a multiprocessor, on every card since 2012."""
SHARED = 49 * 1024
"""Bytes: 48 KiB that a block may declare, and one that the system takes of it since 9.0."""


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    if not LIBRARY.exists():
        reason = memtl.backends.build_record().get("_C_cuda", {}).get("reason")
        pytest.skip(f"_C_cuda was not built: {reason}")
    if path := shutil.which("cuobjdump"):
        return path
    triton = pytest.importorskip("triton")
    try:
        return triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        pytest.skip("no cuobjdump here")


def says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_code_for_every_architecture(cuobjdump):
    asked = memtl.backends.build_record()["_C_cuda"]["archs"].split(", ")
    real = {arch.removesuffix("-real") for arch in asked if not arch.endswith("-virtual")}
    virtual = {arch.removesuffix("-virtual") for arch in asked if not arch.endswith("-real")}
    assert set(re.findall(r"\.sm_(\w+)\.cubin", says(cuobjdump, "-lelf", LIBRARY))) == real
    assert set(re.findall(r"\.sm_(\w+)\.ptx", says(cuobjdump, "-lptx", LIBRARY))) == virtual


def test_nothing_is_spilled(cuobjdump):
    usage = says(cuobjdump, "-res-usage", LIBRARY)
    kernels = re.findall(
        r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    )
    assert kernels and len(kernels) == usage.count(" Function ")
    stacked = {name: stack for name, _, stack, _, local in kernels if int(stack) + int(local) > 0}
    assert not stacked
    # Two blocks of 256 threads fit a multiprocessor at a time. Registers of larger ones were
    # bounded as they were compiled, so that a block can be launched at all.
    fit = {name: REGISTERS // (int(r) * 256) for name, r, *_ in kernels}
    assert not {name: n for name, n in fit.items() if n < 2}
    assert not {name: s for name, _, _, s, _ in kernels if int(s) > SHARED}
