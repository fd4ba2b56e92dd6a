"""The operators of bits and threshold under pytest-benchmark."""

import pytest
import torch

from benchmarks.kernels.cases import bits_cases, threshold_cases

CASES = [
    case for family in (bits_cases, threshold_cases) for case in family(8, "cpu", torch.float32)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits(benchmark, case):
    call = case.make()["memtl"]
    benchmark.extra_info["elements"] = case.elements
    benchmark(call)
