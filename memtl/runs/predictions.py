"""``memtl predict``: what the model of a run says of images, or of texts."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..report.arguments import writable
from ..report.calling import call
from ..training import evaluating
from . import folder
from .ranks import Ranks
from .results import WHICH, autocast, loaded
from .settings import RunSettings


def predict(
    run: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    *,
    which: str = "best",
    device: str = "auto",
    model: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """The class of each input, and how probable the model thinks it.

    Args:
        run: its folder.
        inputs: files of images; for a model of texts, texts.
        which: of the run's checkpoints, "best" or "latest".
        device: as of :class:`RunSettings`.
        model: as of :func:`load`.

    Returns:
        Of each, ``input``, ``class`` and ``probability``.

    Raises:
        ValueError: as :func:`load`; a file is no image.
        OSError: there is no such file.
        ImportError: Pillow is missing.
    """
    if isinstance(inputs, (str, os.PathLike)):
        raise TypeError(f"inputs must be a list of files or texts, got {inputs!r}")
    settings = folder.read(Path(run))
    trained, found = loaded(Path(run), which, model)
    classes = found.facts["classes"]
    where = Ranks.join(device).device
    results = []
    with evaluating(trained.to(where)), autocast(where, settings.precision):
        for given, sample in zip(inputs, _samples(trained, settings, inputs), strict=True):
            chances = F.softmax(trained(sample[None].to(where))[0].float(), 0)
            best = int(chances.argmax())
            results.append({"input": os.fspath(given), "class": classes[best],
                            "probability": chances[best].item()})  # fmt: skip
    return results


def _samples(
    model: nn.Module, settings: RunSettings, inputs: Sequence[str | os.PathLike[str]]
) -> Iterator[Tensor]:
    """As the network takes them in evaluation."""
    from .data.folder import Files
    from .data.opening import TOKENS
    from .data.samples import Images, Texts
    from .data.transform import Transform
    from .networks import wants

    wanted, none = wants(model, settings.size), [0] * len(inputs)
    samples: Images | Texts
    if wanted.kind == "text":
        tokens = min(settings.tokens or TOKENS, wanted.tokenizer.model_max_length)
        texts = [os.fspath(text) for text in inputs]
        samples = Texts(texts, range(len(none)), none, wanted.tokenizer, tokens)
    else:
        files = Files(tuple(map(Path, inputs)))
        samples = Images(files, range(len(none)), none, Transform(wanted))
    return (samples.sample(i, None)[0] for i in range(len(none)))


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, or 2 for a wrong call."""
    options = _parser().parse_args(argv)
    return call("memtl predict", {}, "memtl[data]", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    inputs = [
        path
        for given in options.inputs
        for path in (_images_in(Path(given)) if os.path.isdir(given) else [given])
    ]
    results = predict(options.run, inputs, which=options.which, device=options.device)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    for found in results:
        print(f"{found['class']}\t{found['probability']:.4f}\t{found['input']}")
    return 0


def _images_in(place: Path) -> list[Path]:
    from .data.folder import images_in

    if not (found := images_in(place)):
        raise ValueError(f"{place} has no images")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtl predict",
        description="What the model of a run says of images or texts: a line each, with the class, "
        "its probability and the input.",
    )
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, or folders of them; for a model of texts, texts",
    )
    parser.add_argument("--which", choices=WHICH, default="best", help="checkpoint (best)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the results there too")
    return parser
