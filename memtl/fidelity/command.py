"""``memtl bench fidelity``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import assets, memory, models
from ..report import check_device, environment
from ..tasks import load_digits
from ..training import Settings, fit
from .measure import measure
from .names import DEFAULT, NAMES, named
from .page import page
from .rows import Thresholds
from .runner import Step

SHIPPED = {"vit": "vit_glyphs", "cnn": "cnn_glyphs"}
FIT_BATCH, RATE = 64, 2e-3  # those of the demo


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, or 2 for a wrong call."""
    options = _parser().parse_args(argv)
    try:
        return _run(options, argv)
    except (ImportError, ValueError) as error:
        print(f"memtl bench fidelity: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    if options.output and not importlib.util.find_spec("matplotlib"):
        raise ImportError("the page's plots need matplotlib: pip install memtl[demo]")
    if options.epochs < 0:
        raise ValueError(f"--epochs must be at least 0, got {options.epochs}")
    check_device(options.device)
    thresholds = Thresholds(options.worst, options.mean)
    formats = named(options.formats)
    model, step = _model(options)
    result = measure(
        model, step, formats=formats, batch_size=options.batch_size, seed=options.seed,
        thresholds=thresholds,
    )  # fmt: skip
    print(f"{options.model}, batch {options.batch_size}\n\n{result}")
    if options.output:
        record = {
            "command": shlex.join(["memtl", "bench", "fidelity", *argv]),
            "environment": environment(options.device),
            "model": options.model,
            "epochs": options.epochs,
        }
        data, text = _files(options.output)
        data.write_text(json.dumps(record | result.to_dict(), indent=2) + "\n")
        print(f"\nreport: {page(result, options.model, record).write(text)}")
    return 0


def _model(options: argparse.Namespace) -> tuple[nn.Module, Step]:
    """The model, in training mode, and its step."""
    torch.manual_seed(options.seed)
    if options.model not in SHIPPED:
        if options.epochs:
            raise ValueError(f"--epochs is for {' and '.join(SHIPPED)}, for which there is data")
        model, arguments = models.build(
            options.model,
            batch_size=options.batch_size,
            tokens=options.tokens,
            device=options.device,
        )
        return model.train(), along_a_direction(lambda m: m(**arguments), options.seed)
    task = load_digits()
    if not 1 <= options.batch_size <= len(task.train):
        raise ValueError(
            f"--batch-size must be in [1, {len(task.train)}], got {options.batch_size}"
        )
    model = assets.load(SHIPPED[options.model], task.num_classes).to(options.device)
    if options.epochs:
        steps = options.epochs * len(task.train) // FIT_BATCH
        settings = Settings(steps, FIT_BATCH, RATE, seed=options.seed)
        history = fit(model, task.train, task.val, settings, description="fine-tuning")
        print(f"fine-tuned: {100 * history.val_score:.1f} % of the validation digits")
    batch = torch.arange(options.batch_size)  # an index: a slice would keep the whole split
    images, labels = (t[batch].to(options.device) for t in (task.train.images, task.train.labels))
    return model.train(), lambda m: F.cross_entropy(m(images), labels)


def along_a_direction(forward: Callable[[nn.Module], Any], seed: int = 0) -> Step:
    """A step for a model without a loss: its outputs along a random direction, always the same.

    Not their sum, nor a norm of theirs: after a normalisation those are constants.
    """

    def step(model: nn.Module) -> Tensor:
        found = memory.tensors_in(forward(model))
        outputs = [t for t in found if t.is_floating_point() and t.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        parts = [(t * d).sum() for t, d in zip(outputs, directions, strict=True)]
        if not parts:
            raise ValueError("no output needs a gradient: does any parameter require one?")
        return torch.stack(parts).sum()

    return step


def _files(output: Path) -> tuple[Path, Path]:
    """Where JSON and page go: beside each other, or into a folder."""
    if output.suffix in (".json", ".html"):
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.with_suffix(".json"), output.with_suffix(".html")
    output.mkdir(parents=True, exist_ok=True)
    return output / "fidelity.json", output / "fidelity.html"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtl bench fidelity",
        description="How close the gradients computed from what is kept are to the exact ones, and "
        "at how many bytes: by configuration, by format and role, by depth; and what to choose.",
    )
    parser.add_argument(
        "model",
        help=f"vit or cnn (the shipped networks, on handwritten digits), {models.NAMES}",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="samples (16)")
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="sequence length of an hf: model (128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and dropout (0)")
    parser.add_argument(
        "--epochs", type=int, default=0, metavar="N",
        help="fine-tune vit or cnn on the digits first (0)",
    )  # fmt: skip
    parser.add_argument(
        "--formats", nargs="+", default=DEFAULT, metavar="FORMAT",
        help=f"tried in every role: {NAMES.replace('%', '%%')} ({' '.join(DEFAULT)})",
    )  # fmt: skip
    asked = Thresholds()
    parser.add_argument(
        "--worst", type=float, default=asked.worst, metavar="COSINE",
        help=f"a recommendation has no gradient of a smaller one ({asked.worst:g})",
    )  # fmt: skip
    parser.add_argument(
        "--mean", type=float, default=asked.mean, metavar="COSINE",
        help=f"nor a smaller mean ({asked.mean:g})",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--output", type=Path, metavar="PATH",
        help="write every figure as JSON, and a page with plots: into that folder, or as that "
        ".json or .html and its sibling",
    )  # fmt: skip
    return parser
