"""Runs the cases of interpreted_*.py, each file in a process of its own: Triton decides as it is
imported whether it interprets its kernels, and memtl as it is imported who serves an operator.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

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
