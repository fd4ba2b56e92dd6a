"""``memtl bench``: which measurements there are."""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

SCRIPTS = {
    "kernels": ("every operator on the CPU against its named baselines", "kernels/table.py"),
    "training": ("whole steps on the CPU: stock, checkpointed, converted", "training/table.py"),
    "models": ("every model of the zoo: what converts, what is saved", "models/table.py"),
}
"""Measurement -> what it is, and its script among the benchmarks, which an installation lacks."""

FIDELITY = "how close gradients are to the exact ones, and at how many bytes"


def main(argv: Sequence[str]) -> int:
    """Run a measurement; without one, say which there are. Returns its exit status, or 2 for a
    wrong call."""
    name, *rest = [*argv] or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "fidelity":
        from .fidelity.command import main as fidelity

        return fidelity(rest)
    if name not in SCRIPTS:
        known = ("fidelity", *SCRIPTS)
        near = difflib.get_close_matches(name, known, 1)
        hint = f"do you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        print(f"memtl bench: there is no measurement {name!r}: {hint}", file=sys.stderr)
        return 2
    script = CHECKOUT / "benchmarks" / SCRIPTS[name][1]
    if not script.is_file():
        print(
            f"memtl bench {name}: {script} is not there: benchmarks come with memtl's source, not "
            "with an installation; call it from a checkout (pip install -e .)",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, str(script), *rest]).returncode


def _overview() -> str:
    rows = {"fidelity": FIDELITY, **{name: about for name, (about, _) in SCRIPTS.items()}}
    lines = (f"  {name:8}  {about}" for name, about in rows.items())
    return "\n".join(
        (
            "usage: memtl bench MEASUREMENT ...",
            "",
            *lines,
            "",
            "memtl bench MEASUREMENT --help says what it takes. All but fidelity need a checkout.",
        )
    )
