"""The weight gradients of convolutions under pytest-benchmark."""

import pytest
import torch

from benchmarks.kernels.cases import conv_cases

CASES = list(conv_cases(8, "cpu", torch.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv(benchmark, case):
    call = case.make()["memtl"]
    benchmark.extra_info["elements"] = case.elements
    benchmark(call)
