"""`make models`: does memtl work on the models people fine-tune? Every model of zoo.py, checked.

    python benchmarks/models/table.py [--only PATTERN] [--quick] [--threads N]

For each model, in training mode with random weights, against the model as it was: the forward and
the buffers after it, bit for bit; bytes saved for backward; the gradient of every parameter, along
one random direction of the output, at keep 0.1 and at keep 1; and that unconvert undoes it all. A
model that misses a criterion is marked, and the exit status is then 1. The complete table goes to
results/models.json and docs/models.md.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels import harness  # noqa: E402
from benchmarks.models.check import SEED, Check, check  # noqa: E402
from benchmarks.models.render import HEADER, format_row, markdown, summary  # noqa: E402
from benchmarks.models.zoo import MODELS, QUICK, Entry  # noqa: E402
from memtl.training.progress import track  # noqa: E402


def select(only: str | None, quick: bool) -> list[Entry]:
    """The models whose name or family matches a regular expression; of a few, if quick.

    Raises:
        ValueError: no regular expression, or it matches none.
    """
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise ValueError(f"--only {only!r} is no regular expression: {error}") from None
    found = [
        entry
        for entry in MODELS
        if (pattern.search(entry.name) or pattern.search(entry.family))
        and (not quick or entry.name in QUICK)
    ]
    if not found:
        raise ValueError(f"--only {only!r} matches no model")
    return found


def measure(entry: Entry) -> dict[str, Any]:
    """Build one model and check it: a row of the table."""
    started = time.perf_counter()
    torch.manual_seed(SEED)
    try:
        model, inputs = entry.build()
    except Exception as error:  # a model that cannot be built is a row too
        found = Check(error=f"build: {type(error).__name__}: {error}")
    else:
        found = check(model, inputs)
    found.remaining = tuple(r for r in found.remaining if r.bytes >= 0.01 * (found.kept_bytes or 0))
    return {
        **dataclasses.asdict(entry),
        "library": entry.library,
        **dataclasses.asdict(found),
        "ratio": found.ratio,
        "failures": found.failures(),
        "worst_weight_meets": found.worst_meet(),
        "seconds": time.perf_counter() - started,
    }


def finite(value: Any) -> Any:
    """``value`` with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", metavar="PATTERN", help="a regular expression for names or families"
    )
    parser.add_argument("--quick", action="store_true", help="a few models")
    parser.add_argument("--threads", type=int, help="threads of torch and of the kernels")
    parser.add_argument("--output", type=Path, help="JSON; default for all models: results/")
    parser.add_argument("--document", type=Path, help="Markdown; default for all models: docs/")
    options = parser.parse_args()
    try:
        entries = select(options.only, options.quick)
        libraries = {name: version(name) for name in ("timm", "transformers")}
    except ValueError as error:
        parser.error(str(error))
    except PackageNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install memtl[models]")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)  # gradients are compared bit for bit
    if len(entries) == len(MODELS):  # part of a table does not replace the whole
        options.output = options.output or harness.RESULTS / "models.json"
        options.document = options.document or ROOT / "docs" / "models.md"
    record = harness.environment("cpu", SEED)
    record |= {**libraries, "rows": []}
    print(f"{record['cpu']}, {record['threads']} threads, {record['backends']}\n\n{HEADER}")
    bar = track(entries, "models")
    for entry in bar:
        bar.set_postfix_str(entry.name)
        record["rows"].append(measure(entry))
        bar.write(format_row(record["rows"][-1]))
    print(f"\n{summary(record['rows'])}")
    for path, text in (
        (options.output, json.dumps(finite(record), indent=1, allow_nan=False) + "\n"),
        (options.document, markdown(record)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"written to {harness.relative(str(path.resolve()))}")
    return int(any(row["failures"] for row in record["rows"]))


if __name__ == "__main__":
    sys.exit(main())
