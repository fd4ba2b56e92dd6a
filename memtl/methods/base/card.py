"""The model card beside a save: what was applied to what, and how it is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...nn.swap import original_class
from .config import Config
from .transfer import Trained, TransferConfig

MARKER = "<!-- Written by memtl.save, which will replace it unless this line is taken out. -->"


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def may_be_written(path: Path) -> bool:
    """Whether there is no card, or one by memtl."""
    return not path.exists() or MARKER.encode() in path.read_bytes()


def text(model: nn.Module, configs: Sequence[Config], trained: Trained, size: int) -> str:
    """The card of a save of ``model`` with ``size`` bytes of weights; 0 for the configuration
    alone."""
    name = original_class(model).__name__
    base = base_model(model)
    head = ["library_name: memtl", "tags:", "- memtl", *(f"- {c.method}" for c in configs)]
    if base is not None:
        head.insert(1, f"base_model: {base}")
    rows = [f"| {i} | {c.method} | `{_shown(c)}` |" for i, c in enumerate(configs, 1)]
    kept = f"{size:,} bytes of weights" if size else "none: this is the configuration alone"
    lines = [
        *("---", *head, "---", "", MARKER, ""),
        f"# {name}, fine-tuned with memtl" if size else f"# {name} with memtl",
        "",
        "| | applied | configuration |",
        "|---|---|---|",
        *rows,
        "",
        f"- {trained.summary}",
        f"- saved: {kept}",
        *([f"- base model, by its own configuration: {base}"] if base is not None else []),
        "",
        *("```python", *_loading(model, configs, base, name), "```", ""),
    ]
    return "\n".join(lines)


def base_model(model: Any) -> str | None:
    """The name on the Hub of what ``model`` was made from, as timm and transformers note it; None
    where they note none, or a folder of this machine."""
    timm = getattr(model, "pretrained_cfg", None)
    noted = timm.get("hf_hub_id") if isinstance(timm, dict) else None
    noted = noted or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(noted, str) or not _HUB_ID.fullmatch(noted) or Path(noted).exists():
        return None
    return noted


def _shown(config: Config) -> str:
    """The call that makes ``config``, without what is as by default."""
    given = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            given.append(f"{field.name}={value!r}")
    return f"memtl.{type(config).__name__}({', '.join(given)})".replace("|", "\\|")


def _loading(
    model: Any, configs: Sequence[Config], base: str | None, name: str
) -> tuple[str, str, str, str]:
    """Four lines of Python that load the save."""
    timm = getattr(model, "pretrained_cfg", None)
    # A method makes its own head; other heads have to be there already.
    plain = not any(isinstance(config, TransferConfig) for config in configs)
    classes = getattr(getattr(model, "config", model), "num_labels", None)
    made, package = f"...  # the pre-trained {name}, as before memtl.apply", "torch"
    if isinstance(timm, dict) and "architecture" in timm:
        package = "timm"
        tag = f".{timm['tag']}" if timm.get("tag") else ""
        classes = getattr(model, "num_classes", None)
        option = f", num_classes={classes}" if plain and classes is not None else ""
        made = f'timm.create_model("{timm["architecture"]}{tag}", pretrained=True{option})'
    elif base is not None:
        package = "transformers"
        option = f", num_labels={classes}" if plain and classes is not None else ""
        made = f'transformers.{name}.from_pretrained("{base}"{option})'
    return f"import {package}", "import memtl", f"model = {made}", _LOAD


_LOAD = 'print(memtl.load(model, "."))  # the folder of this file'
