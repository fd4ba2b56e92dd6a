"""Compiles every Triton kernel for the compute capabilities given, and prints as JSON what came out
and the names of all kernels there are. A program of its own, run by test_aot.py: what Triton
interprets it cannot compile.
"""

import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memtl import kernels

ITEMSIZE = {"u8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
UNALIGNED = ("scale", "H", "T", "N")
"""Arguments that are no multiples of 16; pointers and sizes are, as those of whole tensors are."""
VECTOR_LOAD = r"ld\.global\.v[24]|cp\.async\.[^;]*0x10"
LAUNCH = ("num_warps", "num_stages")
"""Constants that are Triton's, not the kernel's."""

bits = kernels.bits
select, threshold = kernels.select, kernels.threshold
query_attention = importlib.import_module("memtl.kernels.query_attention")  # not the launcher


def variants():
    """kernel, dtype, its arguments' types, its constants."""
    yield from bits_variants()
    yield from select_variants()
    yield from threshold_variants()
    for dtype, width in (
        ("fp32", 16),
        ("fp16", 64),
        *itertools.product(("bf16", "fp32", "fp64"), (64, 256)),
    ):
        yield from query_attention_variants(dtype, width, "*fp32" if width == 64 else f"*{dtype}")


def bits_variants():
    signature = {"mask_ptr": "*u8", "bits_ptr": "*u8", "numel": "i64"}
    yield bits._bits_pack_kernel, "u8", signature, {"BLOCK": bits._block(1)}
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        x = f"*{dtype}"
        signature = {"x_ptr": x, "bits_ptr": "*u8", "y_ptr": x, "scale": "fp64", "numel": "i64"}
        block = bits._block(ITEMSIZE[dtype])
        yield bits._bits_apply_kernel, dtype, signature, {"BLOCK": block}


def select_variants():
    block = {"BLOCK": select.BLOCK}
    signature = {"bits_ptr": "*u8", "counts_ptr": "*i64", "numel": "i64"}
    yield select._bits_count_kernel, "u8", signature, block
    for dtype in ("bf16", "fp32"):
        x, sizes = f"*{dtype}", {"numel": "i64", "count": "i64"}
        first = {"x_ptr": x, "bits_ptr": "*u8", "ends_ptr": "*i64", "values_ptr": x}
        yield select._bits_select_kernel, f"{dtype} moved", first | sizes, block
        first = {"values_ptr": x, "bits_ptr": "*u8", "ends_ptr": "*i64", "x_ptr": x}
        yield select._bits_expand_kernel, f"{dtype} moved", first | sizes, block


def threshold_variants():
    """float64 without a mask, the others with one; of digits the first. They read integers."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        integer, infinite = threshold.INTEGERS[dtype]
        name = f"i{8 * integer.itemsize}"
        no_mask = {"mask_ptr": None} if dtype == torch.float64 else {}
        first = {"x_ptr": f"*{name}", "mask_ptr": "*u8"}
        numel, constants = {"numel": "i64"}, {"INFINITE": infinite} | no_mask
        shift, bits = threshold._digits(dtype)[0]
        bins = {"BITS": bits, "BINS": 2**threshold.DIGIT}
        tiles = {"TILE": threshold.TILE, "TILES": threshold.TILES}
        found = {"found_ptr": "*i64", "counts_ptr": "*i64"}
        digit = constants | bins | tiles | {"SHIFT": shift}
        yield threshold._digit_kernel, name, first | found | numel, digit
        constants |= {"BLOCK": threshold.MARKED}
        equal = first | {"key_ptr": "*i64", "counts_ptr": "*i64"} | numel
        yield threshold._equal_kernel, name, equal, constants
        marked = dict.fromkeys(("key_ptr", "ties_ptr", "ends_ptr"), "*i64") | {"bits_ptr": "*u8"}
        yield threshold._mark_kernel, name, first | marked | numel, constants
    yield threshold._choose_kernel, "i64", found, bins


def query_attention_variants(dtype, width, jacobian):
    """Heads of ``width`` features that lie beside each other; a mask for all but the narrowest."""
    x, strides = f"*{dtype}", ("i32", "i32", "i32", "constexpr")
    tensors = {"q_ptr": x, "k_ptr": x, "v_ptr": x, "mask_ptr": x}
    sizes = {"scale": "fp64", **dict.fromkeys("HTNde", "i32")}
    sizes |= {"q_strides": strides, "k_strides": strides, "v_strides": strides}
    sizes |= {"mask_strides": ("i32", "i32", "i32")}
    module, given = query_attention, (DTYPES[dtype], width, width)
    for kernel, signature, constants in (
        (module._out_kernel, tensors | {"out_ptr": x}, module._out_options(*given)),
        (
            module._jacobian_kernel,
            tensors | {"out_ptr": x, "jacobian_ptr": jacobian},
            module._jacobian_options(*given),
        ),
        (
            module._grad_kernel,
            {"grad_out_ptr": x, **tensors, "grad_ptr": x, "grad_out_strides": strides},
            module._grad_options(*given),
        ),
    ):
        signature |= sizes
        stride_one = {(i, 3): 1 for i, types in enumerate(signature.values()) if types == strides}
        no_mask = {"mask_ptr": None} if width < 64 else {}
        yield kernel, dtype, signature, constants | stride_one | no_mask


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
    # A constant has the type "constexpr"; divisibility is an attribute by position (triton >= 3.3),
    # in a tuple by two.
    options = {name: constants[name] for name in LAUNCH if name in constants}
    constants = {name: value for name, value in constants.items() if name not in LAUNCH}
    aligned = {}
    for i, (name, types) in enumerate(signature.items()):
        if name not in UNALIGNED:
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
        "local_bytes": local_bytes(result.asm["cubin"]),
        "vector_loads": len(re.findall(VECTOR_LOAD, result.asm["ptx"])),
        "rounds_to_nearest": len(re.findall(r"cvt\.rn\.bf16", result.asm["ptx"])),
    }


def written() -> list[str]:
    """The kernels that memtl.kernels defines; what they call has other names."""
    modules = [f"memtl.kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    members = [pair for m in modules for pair in vars(importlib.import_module(m)).items()]
    functions = [name for name, value in members if isinstance(value, triton.JITFunction)]
    return sorted(name for name in functions if name.endswith("_kernel"))


if __name__ == "__main__":
    compiled = [compile_kernel(int(c), *v) for c in sys.argv[1:] for v in variants()]
    print(json.dumps({"written": written(), "compiled": compiled}))
