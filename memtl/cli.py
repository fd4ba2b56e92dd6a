"""The ``memtl`` command: doctor, profile, estimate, bench, demo, vtab, tickets, doublewin."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from . import backends, models


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; without one, ``doctor``. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:  # the demo is a program with options of its own
        from .demo import main as demo

        return demo(arguments[1:])
    if arguments[:2] == ["bench", "fidelity"]:  # and so is this
        from .fidelity.command import main as fidelity

        return fidelity(arguments[2:])
    if arguments[:1] == ["estimate"]:
        from .estimate.command import main as estimate

        return estimate(arguments[1:])
    if arguments[:1] == ["vtab"]:
        from .vtab.command import main as vtab

        return vtab(arguments[1:])
    if arguments[:1] == ["tickets"]:
        from .lottery.command import main as tickets

        return tickets(arguments[1:])
    if arguments[:1] == ["doublewin"]:
        from .doublewin.command import main as doublewin

        return doublewin(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="memtl", description="Memory-efficient transfer learning."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("doctor", help="versions, what loaded or why not, who serves what")
    profile = commands.add_parser(
        "profile",
        help="bytes a timm or transformers model saves for backward, stock and converted",
    )
    profile.add_argument("model", help=models.NAMES)
    profile.add_argument("--method", default="back-razor", choices=("back-razor", "low-bit"))
    profile.add_argument("--preset", choices=("fast", "small", "paper"), help="of back-razor")
    profile.add_argument("--keep", type=float, help="fraction kept by back-razor, (0, 1]: 0.1")
    profile.add_argument("--bits", type=int, help="of low-bit: 4")
    profile.add_argument("--batch-size", type=int, default=1)
    profile.add_argument("--tokens", type=int, default=128, help="sequence length of an hf: model")
    profile.add_argument("--device", default="cpu")
    profile.add_argument("--coverage", action="store_true", help="print the coverage table too")
    commands.add_parser("estimate", help="training memory by method, predicted, or what fits")
    bench = commands.add_parser("bench", help="measurements on a model: fidelity")
    bench.add_subparsers(dest="bench", metavar="measurement", required=True).add_parser(
        "fidelity", help="how close gradients are to the exact ones, and at how many bytes"
    )
    commands.add_parser("demo", help="fine-tune handwritten digits several ways and compare")
    commands.add_parser("vtab", help="compare methods on VTAB-1k by its published protocol")
    commands.add_parser("tickets", help="lottery tickets of a pre-trained encoder: which match it")
    commands.add_parser("doublewin", help="tickets of robustly pre-trained networks, transferred")
    options = parser.parse_args(arguments)
    try:
        if options.command == "profile":
            return _profile(options)
    except (ImportError, ValueError) as error:
        print(f"memtl {options.command}: {error}", file=sys.stderr)
        return 2
    print(backends.report())
    return 0


def _profile(options: argparse.Namespace) -> int:
    import torch

    from . import memory
    from .methods import apply, unconvert

    torch.manual_seed(0)
    model, arguments = models.build(
        options.model,
        batch_size=options.batch_size,
        tokens=options.tokens,
        device=options.device,
    )
    model.train()
    config = _config(options)

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


def _config(options: argparse.Namespace) -> Any:
    """The configuration that the options ask for; an option of another method is an error."""
    from .methods import BackRazorConfig, LowBitConfig

    of = {"back-razor": ("preset", "keep"), "low-bit": ("bits",)}
    given = {
        name: value
        for names in of.values()
        for name in names
        if (value := getattr(options, name)) is not None
    }
    if foreign := sorted(given.keys() - set(of[options.method])):
        raise ValueError(f"--{foreign[0]} is no option of --method {options.method}")
    if options.method == "low-bit":
        return LowBitConfig(**given)
    return BackRazorConfig.preset(given.pop("preset", "fast"), **given)
