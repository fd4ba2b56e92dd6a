"""Runs the cases of interpreted_*.py, each file in a process of its own: Triton decides as it is
imported whether it interprets its kernels, and memtl as it is imported who serves an operator.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")


def release(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


# Its interpreter takes arrays of one element for numbers, which NumPy has ceased to do.
pytestmark = pytest.mark.skipif(
    release(triton) < (3, 7) and release(numpy) >= (2, 4),
    reason=f"Triton {triton.__version__} interprets with NumPy below 2.4, not {numpy.__version__}",
)

CASES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_under_the_interpreter(cases):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "MEMTL_BACKEND": "triton"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
