"""query_attention and its gradient under pytest-benchmark."""

import pytest
import torch

from benchmarks.kernels.cases import query_cases

CASES = list(query_cases(8, "cpu", torch.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_query(benchmark, case):
    call = case.make()["memtl"]
    benchmark.extra_info["elements"] = case.elements
    benchmark(call)
