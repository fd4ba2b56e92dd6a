"""The architecture, held: which part of memtl may import which, and what an import brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "memtl"

# From the top down; a part may import those below it. `memory` has a rule of its own.
ORDER = (
    "__main__",
    "cli",
    "bench",
    "demo doublewin estimate fidelity lottery profile runs vtab",
    "report training tasks assets methods models analytic",
    "nn",
    "functional",
    "autograd",
    "storage",
    "_ops _attention files",
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts.split()}
ABOVE_OPS = LEVEL["_ops"]


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of memtl that a file imports, wherever in the file."""
    package = ("memtl", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "memtl" and len(parts) > 1:
                found.add(parts[1])
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    part = part_of(path)
    imported = imported_parts(path) - {part}
    if part == "reference":
        assert imported <= {"_ops", "_attention"}
    elif part == "memory":
        assert imported <= {"_ops"}
    elif part == "backends":
        assert imported <= {"_ops"}  # the backends themselves it imports by name, as it loads them
    else:
        assert part in LEVEL, f"{part} has no place in the order: give it one"
        for other in imported - {"memory"}:
            if other == "backends":
                assert LEVEL[part] < LEVEL["nn"], "who serves an operator concerns reports alone"
            else:
                assert other in LEVEL, f"{part} imports {other}"
                assert LEVEL[other] > LEVEL[part] or LEVEL[other] == LEVEL[part] == LEVEL["report"]
        assert "memory" not in imported or LEVEL[part] < ABOVE_OPS


def test_the_readers_of_imports_see_something():
    assert imported_parts(PACKAGE / "functional" / "linear.py") == {
        "autograd",
        "functional",
        "storage",
    }
    assert "nn" in imported_parts(PACKAGE / "methods" / "back_razor.py")


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_triton_kernels_know_the_operators_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memtl"):
            assert node.module in ("memtl._ops", "memtl._attention")
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("memtl") for alias in node.names)


def test_importing_memtl_brings_no_optional_package():
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import memtl; "
        "print([m for m in ('timm', 'transformers', 'sklearn', 'matplotlib', 'peft', 'tqdm') "
        "if m in sys.modules])"
    )
    # torch itself may load tqdm or triton; memtl must not need any of them.
    alone = subprocess.run(
        [sys.executable, "-c", code.replace("import memtl; ", "import torch, torch._dynamo; ")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = set(ast.literal_eval(done.stdout)) - set(ast.literal_eval(alone))
    assert brought == set()
