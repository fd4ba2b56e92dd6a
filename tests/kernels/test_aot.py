"""Every Triton kernel, compiled ahead of time for three generations of GPUs; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = 48 * 1024  # bytes a block gets on every card without asking for more
PRODUCT_LIMIT = 99 * 1024  # and those that multiply, on every card since sm_80 for asking
REGISTERS = 64 * 1024  # of a multiprocessor
SHARED = {
    80: 164 * 1024,
    90: 228 * 1024,
    100: 228 * 1024,
}  # of a multiprocessor; 1 KiB a block more
WARPS = 8  # two for each of its four schedulers


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> dict:
    """What compile_kernels.py says; in a process where Triton compiles and does not interpret."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MEMTL_BACKEND")}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, CAPABILITIES)],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def compiled(output) -> list[dict]:
    return output["compiled"]


def name(kernel: dict) -> str:
    constants = kernel["constants"]
    return f"{kernel['name']} {kernel['dtype']} sm_{kernel['capability']} ({constants})"


def test_every_kernel_is_compiled(output):
    assert output["written"]
    assert {kernel["name"] for kernel in output["compiled"]} == set(output["written"])


def test_machine_code_comes_out(compiled):
    without = [name(kernel) for kernel in compiled if not kernel["cubin_bytes"]]
    assert not without
    assert {kernel["capability"] for kernel in compiled} == set(CAPABILITIES)


def test_shared_memory_fits(compiled):
    limits = {True: PRODUCT_LIMIT, False: SHARED_LIMIT}
    assert not {name(k): k["shared"] for k in compiled if k["shared"] > limits[k["multiplies"]]}


@pytest.fixture
def used(compiled) -> list[dict]:
    if any(kernel["usage"] is None for kernel in compiled):
        pytest.skip("Triton came without cuobjdump")
    return [kernel | kernel["usage"] for kernel in compiled]


def test_nothing_to_speak_of_is_spilled(used):
    assert not {name(k): k["local_bytes"] for k in used if k["local_bytes"]}


def test_enough_warps_fit_on_a_multiprocessor(used):
    few = {}
    for kernel in used:
        # Registers are given out to a warp, 256 at a time.
        of_program = kernel["warps"] * -(-32 * kernel["registers"] // 256) * 256
        by_shared = SHARED[kernel["capability"]] // (kernel["shared"] + 1024)
        warps = kernel["warps"] * min(REGISTERS // of_program, by_shared)
        if warps < WARPS:
            few[name(kernel)] = warps
    assert not few


def test_products_of_16_bits_are_those_of_tensor_cores(compiled):
    products = [k for k in compiled if k["multiplies"] and k["dtype"] in ("bf16", "fp16")]
    assert products
    assert not [name(kernel) for kernel in products if not kernel["products"]]


def test_aligned_tensors_are_read_in_whole_vectors(compiled):
    # But bits alone, of which a thread has two bytes, and values gathered one by one.
    apart = ("_bits_count_kernel", "_bits_expand_kernel", "_topk_unpack_kernel")
    whole = [kernel for kernel in compiled if kernel["name"] not in apart]
    assert not [name(kernel) for kernel in whole if not kernel["vector_loads"]]


def test_bfloat16_is_rounded_to_nearest(compiled):
    # What the interpreter cannot show: it truncates.
    bfloat16 = [kernel for kernel in compiled if kernel["dtype"] == "bf16"]
    assert bfloat16
    assert not [name(kernel) for kernel in bfloat16 if not kernel["rounds_to_nearest"]]
