"""``memtl profile``: what a model keeps for backward, and a step's time, stock and converted."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from . import memory, models
from .methods import (
    BackRazorConfig,
    CheckpointConfig,
    Config,
    FrozenConfig,
    LowBitConfig,
    apply,
    unconvert,
)
from .methods.back_razor import PRESETS
from .nn import ROLES, Report
from .report.calling import call

OPTIONS = {
    "back-razor": ("preset", "keep"),
    "low-bit": ("bits",),
    "frozen": ("bits",),
    "checkpoint": ("bits",),
}
"""Method -> the options that are its own."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, or 2 for a wrong call."""
    options = _parser().parse_args(argv)
    return call("memtl profile", {}, "memtl[models]", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    configs = configs_of(options)
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
        reports = [apply(model, config) for config in configs]
        converted = measure()
    converted = dataclasses.replace(converted, seconds=memory.step_seconds(model, **arguments))
    if options.coverage:
        report = Report(tuple(row for report in reports for row in report.rows))
        print(report.measure(model, **arguments), end="\n\n")
    unconvert(model)
    stock = dataclasses.replace(stock, seconds=memory.step_seconds(model, **arguments))
    print(memory.comparison(stock, converted))
    return 0


def configs_of(options: argparse.Namespace) -> list[Config]:
    """The configurations that the options ask for, in the order in which they are applied.

    Raises:
        ValueError: a method that there is not, or an option of none of the methods, or of several.
    """
    methods = options.method.split(",")
    if unknown := [method for method in methods if method not in OPTIONS]:
        raise ValueError(f"--method must be among {', '.join(OPTIONS)}, got {unknown[0]!r}")
    given: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for name in sorted({name for names in OPTIONS.values() for name in names}):
        if (value := getattr(options, name)) is None:
            continue
        owners = [method for method in methods if name in OPTIONS[method]]
        if len(owners) != 1:
            what = "an option of each method in" if owners else "no option of"
            raise ValueError(f"--{name} is {what} --method {options.method}")
        given[owners[0]][name] = value
    return [_config(method, given[method]) for method in methods]


def _config(method: str, given: dict[str, Any]) -> Config:
    if method == "low-bit":
        return LowBitConfig(**given)
    if method == "checkpoint":
        return CheckpointConfig(**given)
    if method == "frozen":
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
        "--method",
        default="back-razor",
        metavar="NAME[,NAME]",
        help=f"{', '.join(OPTIONS)}; back-razor,checkpoint for both, in that order (back-razor)",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="of back-razor (fast)")
    parser.add_argument("--keep", type=float, help="fraction kept by back-razor, (0, 1] (0.1)")
    parser.add_argument("--bits", type=int, help="of low-bit (4), frozen (exact), checkpoint (8)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples (1)")
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="sequence length of an hf: model (128)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--coverage", action="store_true", help="print the coverage table too")
    return parser
