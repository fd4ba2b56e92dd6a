"""The operators of topk under pytest-benchmark."""

import pytest
import torch

from benchmarks.kernels.cases import topk_cases

CASES = list(topk_cases(8, "cpu", torch.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_topk(benchmark, case):
    call = case.make()["memtl"]
    benchmark.extra_info["elements"] = case.elements
    benchmark(call)
