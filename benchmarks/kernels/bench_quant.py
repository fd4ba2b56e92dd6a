"""The operators of quant under pytest-benchmark."""

import pytest
import torch

from benchmarks.kernels.cases import quant_cases

CASES = list(quant_cases(8, "cpu", torch.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quant(benchmark, case):
    call = case.make()["memtl"]
    benchmark.extra_info["elements"] = case.elements
    benchmark(call)
