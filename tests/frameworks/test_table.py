"""Every row of docs/frameworks.md names a test that there is."""

import importlib
import re

from tests.frameworks.processes import ddp, fsdp
from tests.helpers import ROOT


def test_every_row_is_tested():
    text = (ROOT / "docs" / "frameworks.md").read_text()
    named = re.findall(r"\| `(\w+)\.(\w+)` \|$", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(named) == len(rows) - 2
    for module, test in named:
        if module.startswith("test_"):
            found = importlib.import_module(f"tests.frameworks.{module}")
        else:
            found = {"ddp": ddp, "fsdp": fsdp}[module]
        assert callable(getattr(found, test)), test
