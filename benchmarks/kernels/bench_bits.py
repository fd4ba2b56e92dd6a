"""The operators of bits under pytest-benchmark."""

import pytest
import torch

from benchmarks.kernels.cases import bits_cases

CASES = list(bits_cases(8, "cpu", torch.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits(benchmark, case):
    call = case.make()["memtl"]
    benchmark.extra_info["elements"] = case.elements
    benchmark(call)
