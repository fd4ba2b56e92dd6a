"""``memtl estimate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

import torch

from ..models import NAMES
from ..report import Table, check_device
from ..report.arguments import count
from . import papers
from .fit import largest_batch, memory
from .predict import Prediction, predict
from .step import OPTIMIZERS, Step
from .ways import WAYS

MIB = 2**20
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PAPERS = {"language": "--lm", "optimizer": "--optimizer", "autocast": "--autocast",
          "tokens": "--tokens", "memory": "--memory", "device": "--device"}  # fmt: skip
"""Options that --analytic has no use for."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, or 2 for a wrong call."""
    options = _parser().parse_args(argv)
    try:
        print(_analytic(options) if options.analytic else _predicted(options))
    except (ImportError, ValueError) as error:
        print(f"memtl estimate: {error}", file=sys.stderr)
        return 2
    return 0


def _analytic(options: argparse.Namespace) -> str:
    for name, option in PAPERS.items():
        if getattr(options, name):
            raise ValueError(f"{option} is no option of --analytic")
    methods = None if options.methods in (None, ["all"]) else options.methods
    return papers.table(
        options.model, methods, batch_size=options.batch_size or 8,
        num_classes=options.num_classes, size=options.size or 224,
    )  # fmt: skip


def _predicted(options: argparse.Namespace) -> str:
    budget = memory(options.memory) if options.memory else None
    if budget and options.batch_size:
        raise ValueError("--memory looks for the batch: it goes without --batch-size")
    check_device(options.device or "cpu")
    step = Step.of(
        options.model, num_classes=options.num_classes, size=options.size,
        tokens=options.tokens or 128, language=options.language,
    )  # fmt: skip
    asked = [] if options.methods in (None, ["all"]) else options.methods
    if unknown := [name for name in asked if name not in WAYS]:
        raise ValueError(f"--methods {unknown[0]}: unknown, known are {', '.join(WAYS)}")
    found: dict[str, Prediction] = {}
    notes = []
    for name in dict.fromkeys(asked or WAYS):
        try:
            best = _predict(step, name, options, budget)
        except (ImportError, ValueError) as error:
            if len(asked) == 1:
                raise
            notes.append(f"{WAYS[name].title} does not apply: {error}")
            continue
        if best is None:
            notes.append(f"{WAYS[name].title} does not fit, not even one sample")
        else:
            found[name] = best
    lines = [_what(step, options), ""]
    if budget:
        found = dict(sorted(found.items(), key=lambda item: -item[1].batch_size))
        lines.append(f"The largest batch within {options.memory}, by prediction:\n")
    lines.append(str(_table(found, bool(budget))) if found else "Nothing fits.")
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _predict(
    step: Step, name: str, options: argparse.Namespace, budget: int | None
) -> Prediction | None:
    change = WAYS[name].change

    def predict_at(batch_size: int) -> Prediction:
        return predict(
            step, lambda model: change(model, step), batch_size=batch_size,
            optimizer=options.optimizer or "adamw", device=options.device or "cpu",
            autocast=AUTOCAST.get(options.autocast),
        )  # fmt: skip

    if budget is None:
        return predict_at(options.batch_size or 8)
    return largest_batch(predict_at, budget)


def _what(step: Step, options: argparse.Namespace) -> str:
    of = f"{options.num_classes} classes" if step.classes else "its tokens"
    each = f"{step.size} x {step.size} pixels" if step.size else f"{options.tokens or 128} tokens"
    batch = "" if options.memory else f", batch {options.batch_size or 8}"
    cast = f", autocast to {options.autocast}" if options.autocast else ""
    return f"{step.name}, {of}, {each}{batch}, {options.optimizer or 'adamw'}{cast}"


def _table(found: dict[str, Prediction], batches: bool) -> Table:
    rows = []
    for name, one in found.items():
        bytes_: Iterable[float] = (
            one.saved_per_sample, one.saved, one.weights, one.gradients, one.optimizer, one.peak
        )  # fmt: skip
        batch = [str(one.batch_size)] if batches else []
        cells = (f"{value / MIB:,.1f}" for value in bytes_)
        rows.append((WAYS[name].title, *batch, f"{one.trainable:,}", *cells))
    header = (
        "MiB", *(["batch"] if batches else []), "trainable", "saved/sample", "saved", "weights",
        "gradients", "optimizer", "peak",
    )  # fmt: skip
    return Table(header, tuple(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtl estimate",
        description="The memory of a training step by several methods, predicted without "
        "allocating it; or the largest batch that fits.",
    )
    parser.add_argument("model", help=NAMES)
    parser.add_argument(
        "--methods", "--method", nargs="+", metavar="METHOD",
        help=f"all, or some of {', '.join(WAYS)} (all); with --analytic of "
        f"{', '.join(papers.METHODS)}",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=count, metavar="N", help="samples (8)")
    parser.add_argument(
        "--memory", metavar="SIZE", help="as 8GiB or 8000MB: the largest batch that fits"
    )
    parser.add_argument(
        "--num-classes", type=count, default=102, metavar="N", help="of the classifier (102)"
    )
    parser.add_argument("--size", type=count, metavar="N", help="pixels of an image's side")
    parser.add_argument("--tokens", type=count, metavar="N", help="of a text (128)")
    parser.add_argument(
        "--lm", dest="language", action="store_true", help="an hf: model learns to predict tokens"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="(adamw)")
    parser.add_argument("--autocast", choices=AUTOCAST, help="of forward and loss")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="whose kernels are taken (cpu)")
    parser.add_argument(
        "--analytic", action="store_true",
        help="by TinyTL's definition, as the papers' tables count it",
    )  # fmt: skip
    return parser
