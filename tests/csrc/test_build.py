"""Installing without native kernels: never a failure, one line that says so, nothing stale."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ["setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "memtl", "kernels"]


@pytest.fixture
def project(tmp_path):
    """A copy of the project, with libraries of an earlier build left in its package."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path / "project"
    folder.mkdir()
    for name in PROJECT:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__", "assets", "_build.json")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    for stale in (folder / "memtl", folder / "build" / "lib" / "memtl"):
        stale.mkdir(parents=True, exist_ok=True)
        (stale / "_C.cpython-310-x86_64-linux-gnu.so").touch()
        (stale / "_C_cuda.abi3.so").touch()
    return folder


def build_wheel(project, **env):
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "MEMTL_NATIVE")}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", *options, "--wheel-dir", "dist", "."],
        cwd=project,
        env=environment | env,
        capture_output=True,
        text=True,
    )
    return done, done.stdout + done.stderr


def check_pure_wheel(project, output, reason):
    lines = [line.strip() for line in output.splitlines() if "memtl: installing" in line]
    wanted = (
        f"memtl: installing without native kernels, since {reason}; CPU operators take the slower "
        "PyTorch reference path."
    )
    assert lines == [wanted]
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        record = json.loads(files.read("memtl/_build.json"))
    assert not [name for name in names if name.endswith(".so")]
    assert {"memtl/_ops.py", "memtl/py.typed", "memtl/reference/quant.py"} <= set(names)
    assert "memtl/kernels/__init__.py" in names
    not_built = {"built": False, "reason": reason}
    assert record == {"_C": not_built, "_C_cuda": not_built}


def test_native_switched_off(project):
    done, output = build_wheel(project, MEMTL_NATIVE="0")
    assert done.returncode == 0, output
    check_pure_wheel(project, output, "MEMTL_NATIVE is 0")


def test_no_compiler(project):
    done, output = build_wheel(project, PATH=str(project / "nothing"))
    assert done.returncode == 0, output
    check_pure_wheel(project, output, "no C++ compiler was found (c++, g++, clang++)")


def test_no_compiler_where_native_was_asked_for(project):
    done, output = build_wheel(project, PATH=str(project / "nothing"), MEMTL_NATIVE="1")
    assert done.returncode != 0
    assert "MEMTL_NATIVE is 1, but no C++ compiler was found" in output


def test_a_compiler_that_fails_is_an_error(project):
    if shutil.which("cmake") is None:
        pytest.importorskip("cmake")
    compiler = project / "c++"
    compiler.write_text("#!/bin/sh\necho 'out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done, output = build_wheel(project, CXX=str(compiler))
    assert done.returncode != 0
    assert "memtl: the native build failed" in output
    assert "MEMTL_NATIVE=0" in output


def test_a_switch_that_means_nothing(project):
    done, output = build_wheel(project, MEMTL_NATIVE="yes")
    assert done.returncode != 0
    assert "MEMTL_NATIVE must be 0, 1 or auto, got 'yes'" in output


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_one_cpp_runtime():
    """Of torch and of every library built here: errors are thrown from one through the other."""
    libraries = sorted((ROOT / "memtl").glob("_C*.so"))
    for library in libraries or pytest.skip("nothing native was built"):
        assert b"\0libstdc++.so.6\0" in library.read_bytes(), library.name
