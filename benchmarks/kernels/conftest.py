"""Has pytest collect bench_*.py in this folder: `python -m pytest benchmarks/kernels`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    asked_for = parent.session.isinitpath(file_path)  # pytest takes those by itself
    if not file_path.match("bench_*.py") or asked_for:
        return None
    return pytest.Module.from_parent(parent, path=file_path)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
