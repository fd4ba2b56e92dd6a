"""Builds the native kernels through CMakeLists.txt and installs kernels/ as memtl.kernels.

MEMTL_NATIVE      auto (default): build them, or go on without where no compiler is found;
                  1: fail where they cannot be built; 0: pure Python
MEMTL_CUDA        auto (default): CUDA kernels where nvcc and a CUDA torch are found; 1; 0
MEMTL_CUDA_ARCHS  compute capabilities, "80;90;100" by default; "native" for the card in here
CMAKE_ARGS        more arguments for CMake

What was built, and why something was not, is written to memtl/_build.json for `memtl doctor`.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(*names: str) -> str | None:
    """The first of the names there is: in this environment, else on PATH."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


CMAKE = find_tool("cmake")
NINJA = find_tool("ninja")


def why_not_native() -> str | None:
    """Why no native code is built, or None where it is."""
    wanted = os.environ.get("MEMTL_NATIVE", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"MEMTL_NATIVE must be 0, 1 or auto, got {wanted!r}")
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if wanted == "0":
        return "MEMTL_NATIVE is 0"
    if find_tool(*compilers) is None:
        missing = f"no C++ compiler was found ({', '.join(compilers)})"
    elif CMAKE is None:
        missing = "cmake was not found"
    elif NINJA is None and find_tool("make") is None:
        missing = "neither ninja nor make was found"
    elif importlib.util.find_spec("torch") is None:
        missing = "torch, whose headers are needed, is not installed where memtl is built"
    else:
        return None
    if wanted == "1":
        raise SystemExit(f"MEMTL_NATIVE is 1, but {missing}")
    return missing


class Build(build):
    """Runs build_ext always: without native code it writes down why."""

    sub_commands = [(n, None if n == "build_ext" else when) for n, when in build.sub_commands]  # noqa: RUF012


class BuildNative(build_ext):
    """Calls CMake and puts what it built into the package."""

    def run(self) -> None:
        package = ROOT / "memtl" if self.inplace else Path(self.build_lib, "memtl")
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("_C*.so"):
            stale.unlink()
        reason = why_not_native()
        record = {name: {"built": False, "reason": reason} for name in ("_C", "_C_cuda")}
        if reason is None:
            work = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
            self.compile(work)
            for built in sorted((work / "memtl").glob("_C*.so")):
                shutil.copy2(built, package)
                record[built.name.split(".")[0]] = {"built": True, "reason": None}
            if record["_C_cuda"]["built"]:
                record["_C_cuda"]["archs"] = (work / "cuda_archs.txt").read_text()
            else:
                record["_C_cuda"]["reason"] = (work / "cuda_missing.txt").read_text()
        else:
            print(
                f"memtl: installing without native kernels, since {reason}; CPU operators take "
                "the slower PyTorch reference path.",
                file=sys.stderr,
            )
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def compile(self, work: Path) -> None:
        shutil.rmtree(work / "memtl", ignore_errors=True)
        arguments = ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
        for name in ("MEMTL_CUDA", "MEMTL_CUDA_ARCHS"):
            value = os.environ.get(name)
            arguments.append(f"-D{name}={value}" if value else f"-U{name}")
        if NINJA is not None:
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
        try:
            subprocess.run([CMAKE, "-S", ROOT, "-B", work, *arguments], check=True)
            subprocess.run([CMAKE, "--build", work, "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"memtl: the native build failed ({error}). MEMTL_CUDA=0 leaves the CUDA kernels "
                "out, MEMTL_NATIVE=0 all of them."
            ) from error


setup(
    py_modules=["memtl_command"],
    packages=[*find_packages(include=["memtl", "memtl.*"]), "memtl.kernels"],
    package_dir={"memtl": "memtl", "memtl.kernels": "kernels"},
    ext_modules=[] if why_not_native() else [Extension("memtl._C", sources=[])],
    cmdclass={"build": Build, "build_ext": BuildNative},
)
