"""Fixtures for every test: a printed seed, and uninitialised memory that shows."""

from __future__ import annotations

import os
import random
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tests.helpers`, however pytest began

with warnings.catch_warnings():
    # Where no kernel is built, import says so once; tests/test_backends.py tests that it does.
    warnings.filterwarnings("ignore", "memtl: CPU operators run", RuntimeWarning)
    import memtl
    import memtl.reference
    from memtl._ops import NAMES


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seeds torch and random, from the test's name; printed, and set by MEMTL_TEST_SEED."""
    given = os.environ.get("MEMTL_TEST_SEED")
    value = int(given) if given else zlib.crc32(request.node.nodeid.encode()) & 0x7FFFFFFF
    print(f"seed {value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture
def poison():
    """New memory is filled with NaN (the largest value of an integer type) while the test runs."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=["reference", "loaded"])
def ops(request):
    """The operators as functions: the readable definitions, and what the dispatcher serves."""
    if request.param == "reference":
        return SimpleNamespace(**memtl.reference.OPS)
    if all(memtl.backends.owner(op, "cpu") == "reference" for op in NAMES):
        pytest.skip("no kernels are loaded for the CPU")
    return torch.ops.memtl
