"""What the model of a run says of images or texts of no known class; ``memtl predict``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..report.arguments import count, writable
from ..report.calling import call
from . import folder
from .data.folder import Files, images_in
from .data.opening import TOKENS
from .data.samples import Images, Samples, Texts
from .data.transform import Transform
from .networks import Wants, wants
from .order import loader
from .ranks import Ranks
from .results import WHICH, loaded


def predict(
    run: str | os.PathLike[str],
    inputs: Sequence[Any],
    *,
    which: str = "best",
    batch_size: int = 32,
    device: str = "auto",
    model: nn.Module | None = None,
) -> list[dict[str, float]]:
    """For every input the probability of every class, the most probable class first.

    Args:
        run: its folder.
        inputs: paths or PIL images for a network of images; texts, or pairs of them, for one of
            texts. They are prepared as in the run's evaluation.
        which: of the run's checkpoints, "best" or "latest".
        batch_size: of a forward.
        device: as of :class:`RunSettings`.
        model: as of :func:`memtl.runs.load`.

    Raises:
        TypeError: ``inputs`` is one path or text, not a sequence of them.
        ValueError: as :func:`memtl.runs.load`; a file is no image.
        OSError: a file cannot be read.
    """
    if isinstance(inputs, (str, os.PathLike)):
        raise TypeError(f"inputs must be a sequence: [{str(inputs)!r}]")
    settings = folder.read(Path(run))
    trained, found = loaded(Path(run), which, model)
    classes = found.facts["classes"]
    taken = wants(settings.model if model is None else model, settings.size)
    samples = _samples(inputs, taken, settings.tokens)
    ranks = Ranks.join(device)
    trained = trained.to(ranks.device)
    batches = [
        [(i, None) for i in range(start, min(start + batch_size, len(samples)))]
        for start in range(0, len(samples), batch_size)
    ]
    result = []
    with torch.inference_mode():
        for batch, _ in loader(samples, batches, 0, ranks.device):
            for row in trained(batch.to(ranks.device)).float().softmax(1).tolist():
                ordered = sorted(zip(classes, row, strict=True), key=lambda pair: -pair[1])
                result.append(dict(ordered))
    return result


def _samples(inputs: Sequence[Any], taken: Wants, tokens: int | None) -> Samples:
    every, none = range(len(inputs)), [0] * len(inputs)
    if taken.kind == "image":
        return Images(_Opened(inputs), every, none, Transform(taken))
    longest = min(tokens or TOKENS, taken.tokenizer.model_max_length)
    return Texts(inputs, every, none, taken.tokenizer, longest)


class _Opened:
    """Images, of which some are still on disk."""

    def __init__(self, inputs: Sequence[Any]):
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int, /) -> Any:
        found = self.inputs[index]
        return Files((Path(found),))[0] if isinstance(found, (str, os.PathLike)) else found


def main(argv: Sequence[str]) -> int:
    """Run ``memtl predict``; returns the exit status: 0, or 2 for a wrong call."""
    options = _parser().parse_args(argv)
    return call("memtl predict", {}, "memtl[train]", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    inputs: list[str] = []
    for text in options.inputs:
        found = images_in(Path(text)) if os.path.isdir(text) else [text]
        if not found:
            raise ValueError(f"{text} has no images")
        inputs += map(str, found)
    said = predict(options.run, inputs, which=options.which, device=options.device)
    width = max(map(len, inputs))
    for text, classes in zip(inputs, said, strict=True):
        shown = list(classes.items())[: options.top]
        print(f"{text:{width}}  {'  '.join(f'{name} {share:.3f}' for name, share in shown)}")
    if options.json:
        options.json.write_text(json.dumps(dict(zip(inputs, said, strict=True)), indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtl predict",
        description="What the model of a run says of images (files, or folders of them) or texts: "
        "the most probable classes, with their probabilities.",
    )
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder or text")
    parser.add_argument("--top", type=count, default=3, metavar="N", help="classes shown (3)")
    parser.add_argument("--which", choices=WHICH, default="best", help="checkpoint (best)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write all of it there too")
    return parser
