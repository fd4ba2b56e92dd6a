"""Builds the native tests with address and undefined-behaviour sanitisers and runs them."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = sorted(path.stem for path in (ROOT / "csrc" / "tests").glob("test_*.cpp"))
PATH = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))


@pytest.fixture(scope="module")
def build():
    tools = {tool: shutil.which(tool, path=PATH) for tool in ("cmake", "ninja")}
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or None in tools.values():
        pytest.skip("no C++ compiler, cmake or ninja here")
    folder = ROOT / "build" / "native-tests"  # kept: the next run builds what changed
    options = ["MODULE=OFF", "TESTS=ON", "SANITIZE=ON", "WERROR=ON"]
    configure = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"]
    configure += [f"-DMEMTL_{option}" for option in options]
    for command in (["-S", ROOT, "-B", folder, *configure], ["--build", folder]):
        done = subprocess.run([tools["cmake"], *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("test", TESTS)
def test_native_test_passes(build, test):
    done = subprocess.run([build / test], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
