"""Compiles every Triton kernel for the compute capabilities given, and prints as JSON what came out
and the names of all kernels there are. A program of its own, run by test_aot.py: what Triton
interprets it cannot compile. One process for each processor shares the work.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memtl import kernels

UNALIGNED = ("scale", "lo", "hi", "step", "seed", "H", "T", "M", "N")
"""Arguments that are no multiples of 16; pointers and sizes are, as those of whole tensors are."""
VECTOR_LOAD = r"ld\.global\.v[24]|cp\.async\.[^;]*0x10"
PRODUCT = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma"
"""Of tensor cores."""
LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion")
"""Constants that are Triton's, not the kernel's."""


def variants():
    """kernel, dtype, its arguments' types, its constants: from every file of variants/, which is
    named after the module whose kernels it lists."""
    for path in sorted(Path(__file__).with_name("variants").glob("*.py")):
        yield from runpy.run_path(str(path))["variants"]()


def usage(cubin: bytes) -> dict[str, int] | None:
    """Registers of a thread, and the bytes that it keeps outside of them (STACK, LOCAL); None
    without cuobjdump."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed)}
    return {"registers": found["REG"], "local_bytes": found["STACK"] + found["LOCAL"]}


def compile_kernel(capability, kernel, dtype, signature, constants) -> dict:
    # A constant has the type "constexpr"; divisibility is an attribute by position (triton >= 3.3),
    # in a tuple by two.
    options = {name: constants[name] for name in LAUNCH if name in constants}
    constants = {name: value for name, value in constants.items() if name not in LAUNCH}
    aligned = {}
    for i, (name, types) in enumerate(signature.items()):
        if name not in UNALIGNED and name not in constants:
            paths = [(i, j) for j in range(len(types))] if isinstance(types, tuple) else [(i,)]
            aligned |= {path: [["tt.divisibility", 16]] for path in paths if path not in constants}
    names = [name for name in constants if isinstance(name, str)]
    signature = signature | dict.fromkeys(names, "constexpr")
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "name": kernel.__name__,
        "dtype": dtype,
        "capability": capability,
        "constants": ", ".join(f"{k}={v}" for k, v in constants.items()),
        "cubin_bytes": len(result.asm["cubin"]),
        "shared": result.metadata.shared,
        "warps": result.metadata.num_warps,
        "usage": usage(result.asm["cubin"]),
        "multiplies": "tl.dot(" in kernel.src,
        "products": len(re.findall(PRODUCT, result.asm["ptx"])),
        "vector_loads": len(re.findall(VECTOR_LOAD, result.asm["ptx"])),
        "rounds_to_nearest": len(re.findall(r"cvt\.rn\.bf16", result.asm["ptx"])),
    }


def written() -> list[str]:
    """The kernels that memtl.kernels defines; what they call has other names."""
    modules = [f"memtl.kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    members = [pair for m in modules for pair in vars(importlib.import_module(m)).items()]
    functions = [name for name, value in members if isinstance(value, triton.JITFunction)]
    return sorted(name for name in functions if name.endswith("_kernel"))


WORK: list[tuple] = []
"""capability, variant; processes inherit it, for kernels cannot be pickled."""


def compile_nth(n: int) -> dict:
    capability, variant = WORK[n]
    return compile_kernel(capability, *variant)


if __name__ == "__main__":
    WORK += itertools.product([int(c) for c in sys.argv[1:]], variants())
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        compiled = pool.map(compile_nth, range(len(WORK)), chunksize=1)
    print(json.dumps({"written": written(), "compiled": compiled}))
