"""``memtl train`` and ``memtl eval``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import Table
from ..report.arguments import count, writable
from ..report.calling import call
from . import settings as reading
from .chosen import overview
from .folder import WEIGHTS
from .loop import Interrupted
from .loop import train as train_run
from .results import SPLITS, WHICH
from .results import evaluate as evaluate_run
from .settings import RunSettings

INSTALL = "memtl[train]"
FEW = 32
"""Classes that are shown one by one."""


def train(argv: Sequence[str]) -> int:
    """Run ``memtl train``; returns the exit status: 0, 1 where training diverged, 2 for a wrong
    call, 128 and the signal's number where it was interrupted."""
    return call("memtl train", {}, INSTALL, lambda: _train(argv))


def evaluate(argv: Sequence[str]) -> int:
    """Run ``memtl eval``; returns the exit status: 0, or 2 for a wrong call."""
    return call("memtl eval", {}, INSTALL, lambda: _evaluate(argv))


def _train(argv: Sequence[str]) -> int:
    options, words = _train_parser().parse_known_args(argv)
    given = reading.read_file(options.config) if options.config else {}
    try:
        settings = reading.read(reading.override(given, words))
    except TypeError as error:  # of a word of the line or the file, so the call is wrong
        raise ValueError(error) from None
    out = options.out or Path("runs", _folder_name(settings))
    try:
        summary = train_run(settings, out, fresh=options.fresh)
    except Interrupted as interrupted:
        again = shlex.join(["memtl", "train", *(word for word in argv if word != "--fresh")])
        print(f"saved after step {interrupted.step}; to go on: {again}", file=sys.stderr)
        return 128 + interrupted.signal
    except KeyboardInterrupt:
        print("ended at once: it goes on from its last checkpoint", file=sys.stderr)
        return 130
    if int(os.environ.get("RANK", "0")) == 0:
        print(_text(summary, out))
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    options = _eval_parser().parse_args(argv)
    result = evaluate_run(
        options.run, split=options.split, data=options.data, which=options.which,
        batch_size=options.batch_size, device=options.device,
    )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    classes = result.pop("classes")
    for name, value in result.items():
        print(f"{name:10} {value:.4f}" if isinstance(value, float) else f"{name:10} {value}")
    if len(classes) <= FEW:
        print(f"\n{_of_classes(classes)}")
    return 0


def _of_classes(classes: Mapping[str, Mapping[str, int]]) -> Table:
    """Of every class how many samples it has, and how many are predicted; the shares of either that
    are right."""
    rows = []
    for name, of in classes.items():
        shares = (of["right"] / n if (n := of[key]) else None for key in ("samples", "predicted"))
        recall, precision = ("-" if share is None else f"{share:.4f}" for share in shares)
        rows.append((name, str(of["samples"]), recall, str(of["predicted"]), precision))
    return Table(("class", "samples", "recall", "predicted", "precision"), tuple(rows))


def _folder_name(settings: RunSettings) -> str:
    """Model, data and method, as one name of a folder."""
    parts = (settings.model, Path(settings.data).name, settings.methods)
    return re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")


def _text(summary: dict[str, Any], out: Path) -> str:
    """What came out, and what to do with it."""
    kib, metric = 1024, summary["metric"]
    saved, peak = summary["saved_bytes_per_sample"], summary["peak_bytes"]
    test = summary["test_score"]
    rows = {
        f"val {metric}": f"{summary['val_score']:.4f} after step {summary['best_step']}, the best",
        f"test {metric}": "there is no test split" if test is None else f"{test:.4f} of that step",
        "kept for backward": "not measured"
        if saved is None
        else f"{saved / kib:,.1f} KiB a sample",
        "peak memory": "not measured" if peak is None else f"{peak / kib**2:,.1f} MiB",
        "time of a step": f"{summary['seconds_per_step']:.3f} s",
        "best weights": f"{out / WEIGHTS}",
    }
    width = max(map(len, rows))
    where = shlex.quote(str(out))
    what = "IMAGE ..." if summary["kind"] == "image" else "TEXT ..."
    return "\n".join(
        (
            *(f"{name:{width}}  {value}" for name, value in rows.items()),
            "",
            f"memtl eval {where} [--data NAME]",
            f"memtl predict {where} {what}",
            f"model = memtl.runs.load({str(out)!r})  # after `import memtl.runs`",
        )
    )


def _train_parser() -> argparse.ArgumentParser:
    rows = []
    for field in dataclasses.fields(RunSettings):
        name, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        default = "" if field.default in ("", None, ()) else f" ({str(field.default).lower()})"
        rows.append(f"  {name:18} {text}{default}")
    parser = argparse.ArgumentParser(
        prog="memtl train",
        usage="memtl train --model NAME --data NAME [--config FILE] [--out DIR] [--fresh] "
        "[--SETTING VALUE | SETTING=VALUE ...]",
        description="Fine-tune a model. Called again with the same settings it goes on where it "
        "was, however it ended. torchrun --nproc-per-node N -m memtl train ... uses N processes.",
        epilog="settings:\n" + "\n".join(rows) + "\n\nmethods:\n" + overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings in YAML; those of the line go before"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (runs/MODEL-DATA-METHOD)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete what an earlier run left there"
    )
    return parser


def _eval_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtl eval", description="How good the model of a run is, finished or not."
    )
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument(
        "--split", choices=SPLITS, help="(test, if there is one, else val; all of other data)"
    )
    parser.add_argument("--data", metavar="NAME", help="other data, of the same classes")
    parser.add_argument("--which", choices=WHICH, default="best", help="checkpoint (best)")
    parser.add_argument("--batch-size", type=count, metavar="N", help="(the run's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the result there too")
    return parser
