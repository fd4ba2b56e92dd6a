"""``memtl profile``: what a model keeps for backward, and a step's time, stock and converted."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from . import memory, models
from .methods import BackRazorConfig, FrozenConfig, LowBitConfig, apply, unconvert
from .methods.back_razor import PRESETS
from .methods.base.config import ConversionConfig
from .nn import ROLES
from .report.calling import call

OPTIONS = {"back-razor": ("preset", "keep"), "low-bit": ("bits",), "frozen": ("bits",)}
"""Method -> the options that are its own."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, or 2 for a wrong call."""
    options = _parser().parse_args(argv)
    return call("memtl profile", {}, "memtl[models]", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    config = config_of(options)
    model, arguments = models.build(
        options.model,
        batch_size=options.batch_size,
        tokens=options.tokens,
        device=options.device,
    )
    model.train()

    def measure() -> memory.Profile:
        return memory.profile(model, batch_size=options.batch_size, **arguments)

    with memory.freed_memory_returned():  # memory first: see there
        stock = measure()
        report = apply(model, config)
        converted = measure()
    converted = dataclasses.replace(converted, seconds=memory.step_seconds(model, **arguments))
    if options.coverage:
        print(report.measure(model, **arguments), end="\n\n")
    unconvert(model)
    stock = dataclasses.replace(stock, seconds=memory.step_seconds(model, **arguments))
    print(memory.comparison(stock, converted))
    return 0


def config_of(options: argparse.Namespace) -> ConversionConfig:
    """The configuration that the options ask for.

    Raises:
        ValueError: an option is of another method.
    """
    given = {
        name: value
        for names in OPTIONS.values()
        for name in names
        if (value := getattr(options, name)) is not None
    }
    if foreign := sorted(given.keys() - set(OPTIONS[options.method])):
        raise ValueError(f"--{foreign[0]} is no option of --method {options.method}")
    if options.method == "low-bit":
        return LowBitConfig(**given)
    if options.method == "frozen":
        return FrozenConfig(**dict.fromkeys(ROLES, given.get("bits")))
    return BackRazorConfig.preset(given.pop("preset", "fast"), **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtl profile",
        description="The bytes that a model of timm's or transformers' saves for backward, as it "
        "is and converted, by layer; the peak and the time of a step of both.",
    )
    parser.add_argument("model", help=models.NAMES)
    parser.add_argument(
        "--method", default="back-razor", choices=tuple(OPTIONS), help="(back-razor)"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="of back-razor (fast)")
    parser.add_argument("--keep", type=float, help="fraction kept by back-razor, (0, 1] (0.1)")
    parser.add_argument("--bits", type=int, help="of low-bit (4) and frozen (exact)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples (1)")
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="sequence length of an hf: model (128)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--coverage", action="store_true", help="print the coverage table too")
    return parser
