"""The program: options, and where results go."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.kernels import harness
from memtl.files import write_aside
from memtl.report.arguments import count

from . import report
from .entries import BACKBONES
from .runs import QUICK, compare

SEEDS, ROUNDS = 3, 15
DOCUMENT = harness.ROOT / "docs" / "comparison.md"
FOLDER = harness.ROOT / "runs" / "comparison"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.comparison",
        description="Fine-tune the shipped networks every way there is: accuracy, bytes saved, "
        "peak, time. Interrupted at any time, it goes on where it was.",
    )
    names = [backbone.name for backbone in BACKBONES]
    parser.add_argument("--only", choices=names, help="one network")
    parser.add_argument(
        "--seeds", type=count, default=SEEDS, metavar="N", help="runs (%(default)s)"
    )
    parser.add_argument("--threads", type=count, metavar="N", help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see it work")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="DIR", help="folder of finished runs"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="default for all networks: results/"
    )
    parser.add_argument(
        "--document", type=Path, metavar="PATH", help="default for all networks: docs/comparison.md"
    )
    parser.add_argument(
        "--render", action="store_true", help="only the document, of what --json has already"
    )
    options = parser.parse_args()
    if not options.quick and not options.only:  # a part does not replace the whole
        options.json = options.json or harness.result_path("comparison")
        options.document = options.document or DOCUMENT
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.render:
        if options.json is None or not options.json.exists():
            parser.error("--render needs the --json of a comparison that was made")
        record = json.loads(options.json.read_text())
    else:
        record = harness.environment("cpu", 0)
        backbones = tuple(
            b for b in (QUICK if options.quick else BACKBONES) if options.only in (None, b.name)
        )
        print(f"{record['cpu']}, {record['threads']} threads", flush=True)
        say = lambda line: print(f"  {line}", flush=True)  # noqa: E731
        record["backbones"] = compare(
            backbones, options.seeds, 1 if options.quick else ROUNDS, options.out, say
        )
        if options.json is not None:
            text = json.dumps(record, indent=1) + "\n"
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_aside(options.json, lambda path: path.write_text(text))
    for backbone in record["backbones"]:
        print(f"\n{backbone['name']}, {backbone['task']}\n{report.table(backbone)}")
        print(report.verdict(backbone))
    if options.document is not None:
        options.document.parent.mkdir(parents=True, exist_ok=True)
        options.document.write_text(report.document(record, options.document.parent))
        print(f"\nwritten to {harness.relative(str(options.document.resolve()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
