"""Compiles every Triton kernel for the compute capabilities given, and prints as JSON what came out
and the names of all kernels there are. A program of its own, run by test_aot.py: what Triton
interprets it cannot compile.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memtl import kernels

ITEMSIZE = {"u8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}

bits = kernels.bits


def variants():
    """kernel, dtype, its arguments' types, its constants; pointers and sizes are multiples of 16,
    as those of whole tensors are."""
    signature = {"mask_ptr": "*u8", "bits_ptr": "*u8", "numel": "i64"}
    yield bits._bits_pack_kernel, "u8", signature, {"BLOCK": bits._block(1)}
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        x = f"*{dtype}"
        signature = {"x_ptr": x, "bits_ptr": "*u8", "y_ptr": x, "scale": "fp64", "numel": "i64"}
        block = bits._block(ITEMSIZE[dtype])
        yield bits._bits_apply_kernel, dtype, signature, {"BLOCK": block}


def local_bytes(cubin: bytes) -> int | None:
    """Bytes a thread keeps outside its registers; None without cuobjdump."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def compile_kernel(capability, kernel, dtype, signature, constants) -> dict:
    # A constant has the type "constexpr"; divisibility is an attribute by position (triton >= 3.3).
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t != "fp64"
    }
    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return {
        "name": kernel.__name__,
        "dtype": dtype,
        "capability": capability,
        "cubin_bytes": len(result.asm["cubin"]),
        "shared": result.metadata.shared,
        "local_bytes": local_bytes(result.asm["cubin"]),
        "vector_loads": len(re.findall(r"ld\.global\.v[24]", result.asm["ptx"])),
        "rounds_to_nearest": len(re.findall(r"cvt\.rn\.bf16", result.asm["ptx"])),
    }


def written() -> list[str]:
    """The kernels that memtl.kernels defines."""
    modules = [f"memtl.kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    members = [pair for m in modules for pair in vars(importlib.import_module(m)).items()]
    return sorted(name for name, value in members if isinstance(value, triton.JITFunction))


if __name__ == "__main__":
    compiled = [compile_kernel(int(c), *v) for c in sys.argv[1:] for v in variants()]
    print(json.dumps({"written": written(), "compiled": compiled}))
