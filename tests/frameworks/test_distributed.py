"""Training in several processes: two, with gloo, under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.frameworks.processes import ddp, fsdp
from tests.helpers import ROOT


def checks(module) -> list[str]:
    return [name for name in vars(module) if name.startswith("check_")]


def run(module) -> tuple[list[str], str]:
    """The checks that passed in both processes, and all that these said."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, module.__file__],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    passed = [line[1] for line in lines if len(line) == 2 and line[0] == "passed"]
    return passed, done.stdout + done.stderr


@pytest.fixture(scope="module")
def in_ddp():
    return run(ddp)


@pytest.fixture(scope="module")
def in_fsdp():
    return run(fsdp)


@pytest.mark.parametrize("check", checks(ddp))
def test_distributed_data_parallel(in_ddp, check):
    passed, said = in_ddp
    assert check in passed, said


@pytest.mark.parametrize("check", checks(fsdp))
def test_fully_sharded(in_fsdp, check):
    passed, said = in_fsdp
    assert check in passed, said
