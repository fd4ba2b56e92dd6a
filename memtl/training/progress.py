"""Progress bars that know when to be silent."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def track(
    items: Iterable, description: str, *, progress: bool | None = None, **options: Any
) -> tqdm:
    """Iterate over ``items`` behind a bar, which is wiped when the loop ends.

    Args:
        items: what to iterate over.
        description: written before the bar.
        progress: True shows the bar, False does not; None shows it in a terminal or a notebook.
            ``MEMTL_PROGRESS=0`` or ``TQDM_DISABLE=1`` in the environment silences every bar.
        **options: passed to tqdm.
    """
    muted = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    if muted or os.environ.get("MEMTL_PROGRESS") == "0":
        progress = False
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        items, description, disable=not progress, leave=False, dynamic_ncols=True, **options
    )
