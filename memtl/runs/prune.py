"""``memtl prune``: which weights of a network survive, as a file to apply."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..methods import Ticket, TicketConfig, draw_ticket
from ..methods.tickets.config import CHOICES
from ..methods.tickets.drawing import TRAINED
from ..methods.tickets.patterns import GROUPED, UNSTRUCTURED, n_of_m
from ..report import Table
from ..report.calling import call
from .networks import NAMES, create

FILE = "ticket.safetensors"
SCHEMES = tuple(scheme for scheme in CHOICES["scheme"] if scheme not in TRAINED)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, or 2 for a wrong call."""
    options = _parser().parse_args(argv)
    return call("memtl prune", {}, "memtl[models]", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    config = TicketConfig(
        scheme=options.scheme,
        sparsity=_sparsity(options),
        scope=None if options.scope is None else tuple(options.scope),
        pattern=options.pattern,
        level=options.level,
        seed=options.seed,
    )
    path = options.out / FILE
    if path.exists():
        raise ValueError(f"{path} is there already: delete it, or choose another --out")
    model = _model(options)
    ticket = draw_ticket(model, config)
    options.out.mkdir(parents=True, exist_ok=True)
    ticket.save(path, model if options.weights else None)
    restored = "ticket.restore(model)  # the weights that survive\n  " if options.weights else ""
    print(
        f"{table(ticket)}\n\n"
        f"{path}: {path.stat().st_size:,} bytes. To train what survives:\n\n"
        f'  ticket = memtl.Ticket.load("{path}")\n'
        f"  {restored}ticket.apply(model)  # a {options.model}, with any head\n"
        "  ...  # your loop: pruned weights stay zero"
    )
    return 0


def table(ticket: Ticket) -> str:
    """Of every weight, and of all of them, how many elements survive."""
    rows = [
        (layer.name, "x".join(map(str, layer.shape)), layer.kept, layer.size)
        for layer in ticket.layers
    ]
    rows.append(("all", "", sum(r[2] for r in rows), sum(r[3] for r in rows)))
    return str(
        Table(
            ("weight", "shape", "kept", "of", "pruned %"),
            tuple(
                (name, shape, f"{kept:,}", f"{size:,}", f"{100 * (1 - kept / size):.1f}")
                for name, shape, kept, size in rows
            ),
        )
    )


def _sparsity(options: argparse.Namespace) -> float:
    """What was asked for; of the pattern "N:M" it follows from that."""
    if options.sparsity is not None:
        return options.sparsity
    if found := n_of_m(options.pattern):
        kept, of = found
        return 1 - kept / of if of else 0.0
    raise ValueError("--sparsity must be given: how much of the weights is pruned, in [0, 1)")


def _model(options: argparse.Namespace) -> nn.Module:
    """The network of that name, or of the run in that folder."""
    if (Path(options.model) / "run.yaml").is_file():
        if options.pretrained is not True:
            raise ValueError("--pretrained is of a network by name: a run has its own weights")
        return importlib.import_module("memtl.runs.results").load(options.model)
    torch.manual_seed(options.seed)
    # A ticket is of the backbone: the head plays no part.
    return create(options.model, num_classes=2, pretrained=options.pretrained)


def weights_from(text: str) -> bool | str:
    """``true``, ``false`` or a file, as a type of argparse."""
    return {"true": True, "false": False}.get(text.lower(), text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtl prune",
        description="Draw a lottery ticket: which weights of a network survive, at one bit a "
        "weight, in a file that memtl.Ticket.load reads. Tickets that are drawn by training "
        f"({', '.join(TRAINED)}) are made by memtl.draw_ticket and memtl tickets.",
    )
    parser.add_argument("model", help=f"the folder of a run of memtl train, or {NAMES}")
    parser.add_argument(
        "--sparsity", type=float, metavar="S",
        help="how much of the weights is pruned, in [0, 1); of N:M patterns 1 - N/M",
    )  # fmt: skip
    parser.add_argument(
        "--pattern", default=UNSTRUCTURED,
        help=f"what survives together: {UNSTRUCTURED}, {', '.join(GROUPED)} or N:M "
        f"({UNSTRUCTURED})",
    )  # fmt: skip
    parser.add_argument(
        "--scheme", choices=SCHEMES, default="magnitude", help="what survives (magnitude)"
    )
    parser.add_argument(
        "--level", choices=CHOICES["level"], default="global",
        help="one threshold for all weights, or as much of each layer (global)",
    )  # fmt: skip
    parser.add_argument(
        "--scope", nargs="+", metavar="PATTERN",
        help="names of weights in the backbone, with * (all linear layers and convolutions)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of random tickets and weights (0)")
    parser.add_argument(
        "--pretrained", type=weights_from, default=True, metavar="WEIGHTS",
        help="true, false (random ones) or a file with a state dict (true)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", action="store_true", help="write the surviving weights into the file too"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help=f"where {FILE} is written"
    )
    return parser
