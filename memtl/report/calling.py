"""What commands of many runs have in common: which exit status an error means, and what is said."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor


def call(name: str, extras: Mapping[str, str], install: str, run: Callable[[], int]) -> int:
    """Run a command; returns the exit status: that of ``run``, 1 where a training diverged or a
    process died, 2 for a wrong call. Errors that are neither are raised.

    Args:
        name: of the command, as in "memtl tickets".
        extras: modules it needs -> the packages that have them.
        install: what pip installs to have them all.
        run: the command.
    """
    missing = [
        package for module, package in extras.items() if not importlib.util.find_spec(module)
    ]
    if missing:
        print(f"{name} needs {', '.join(missing)}: pip install {install}", file=sys.stderr)
        return 2
    try:
        return run()
    except FloatingPointError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except BrokenExecutor:
        print(
            f"{name}: a process ended before its work did; was there memory enough for so many "
            "--jobs? Called again, this goes on where it was",
            file=sys.stderr,
        )
        return 1
    except (ImportError, OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
