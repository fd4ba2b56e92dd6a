"""What the script ``memtl`` runs.

Importing memtl takes seconds, since importing torch does. This runs memtl/cli.py without the
package around it, which a command brings in when it is called: help and a wrong word are answered
at once.
"""

import importlib.util
from pathlib import Path


def main() -> int:
    """Run ``memtl``; returns the exit status."""
    package = importlib.util.find_spec("memtl")  # found, not imported
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "cli.py")
    spec = importlib.util.spec_from_file_location("memtl.cli", path)
    assert spec is not None and spec.loader is not None
    cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    return cli.main()
