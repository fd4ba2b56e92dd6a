"""``memtl vtab``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import assets
from ..methods import applied, save
from ..methods.base.record import unwrapped
from ..report import check_device, environment, mean_std
from ..tasks import VtabTask, load_digits_vtab, load_vtab
from ..tasks.vtab import DATASETS, NORMALISATIONS, OTHER, datasets
from ..training import Way, costs, seeded
from .backbone import Backbone, line
from .caches import CACHE_GIB, GIB, Caches
from .method import Grid, Method
from .methods import methods
from .page import costs_table, page
from .protocol import Outcome, Protocol
from .runs import Key, Runs
from .summary import DIVERGED, Summary, percent

SHIPPED = "vit_glyphs"
ROUNDS, QUICK_ROUNDS = 10, 2
QUICK_EPOCHS, QUICK_SEEDS = 1, 2


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, or 2 for a wrong call or wrong data."""
    options = _parser().parse_args(argv)
    try:
        return _run(options, argv)
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except (ImportError, NotImplementedError, ValueError, OSError) as error:
        print(f"memtl vtab: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    if not importlib.util.find_spec("matplotlib"):
        raise ImportError("the page's plots need matplotlib: pip install memtl[demo]")
    check_device(options.device)
    _check_data(options)
    protocol = _protocol(options)
    backbone = Backbone(
        options.model, 3 if options.data else 1, options.size, options.pretrained,
        options.checkpoint,
    )  # fmt: skip
    caches = _caches(options)
    asked = _methods(options, methods(backbone, caches))
    tasks = _tasks(options, backbone.image_size)
    chosen, left_out = _served(asked, backbone, options)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with Runs(options.output / "runs.jsonl") as runs:
        _begin(backbone, tasks, chosen, protocol, runs, options)
        batch = min(protocol.batch_size, len(tasks[0].train))
        rounds = QUICK_ROUNDS if options.quick else ROUNDS
        ways = [_way(method, tasks[0], batch, options.device) for method in chosen]
        found = costs(ways, rounds, optimizer="adam")
        cost = {m.name: c for m, c in zip(chosen, found, strict=True)}
        outcomes = []
        for task in tasks:
            for method in chosen:
                outcome = protocol.run(
                    task, method, runs, model=backbone.name, weights=backbone.weights,
                    device=options.device, save=_saver(options),
                )  # fmt: skip
                print(_line(outcome), flush=True)
                outcomes.append(outcome)
    summary = Summary(outcomes)
    grids = {method.name: method.grid for method in chosen}
    record: dict[str, Any] = {
        "command": shlex.join(["memtl", "vtab", *argv]),
        "environment": environment(options.device),
        "model": {
            "name": backbone.name,
            "weights": backbone.weights,
            "weights_from": _weights_from(backbone),
            "parameters": sum(p.numel() for p in backbone.source.parameters()),
        },
        "protocol": dataclasses.asdict(protocol),
        "left_out": left_out,
        "caches": {"folder": str(caches.folder), "bytes": caches.nbytes},
        "grids": {name: dataclasses.asdict(grid) for name, grid in grids.items()},
        "size": backbone.image_size,
        "normalisation": options.normalise or "that of the digits",
        "datasets": {task.name: _dataset(task) for task in tasks},
        "measured": {"dataset": tasks[0].name, "batch": batch, "rounds": rounds},
        "costs": {name: dataclasses.asdict(c) for name, c in cost.items()},
        "outcomes": [dataclasses.asdict(o) | {"mean": o.mean} for o in outcomes],
        "means": {mean.label: mean.values for mean in summary.means()},
        "wall_seconds": time.perf_counter() - started,
    }
    if len(summary.datasets) > 1:
        print(f"\n{summary.table()}")
    print(f"\n{costs_table(summary, cost, batch)}\n")
    if options.quick:
        print("a quick run: too short for its accuracies and times to mean anything")
    if caches.nbytes:
        print(f"caches: {caches.folder}, {caches.nbytes / GIB:.3g} GiB")
    (options.output / "vtab.json").write_text(json.dumps(record, indent=2) + "\n")
    written = page(summary, cost, protocol, grids, record).write(options.output / "vtab.html")
    print(f"report: {written}")
    return 0


def _begin(
    backbone: Backbone,
    tasks: Sequence[VtabTask],
    chosen: Sequence[Method],
    protocol: Protocol,
    runs: Runs,
    options: argparse.Namespace,
) -> None:
    """Say what is going to happen, and what a run that was ended has left."""
    trainings = len(tasks) * sum(len(m.grid) + len(protocol.seeds) for m in chosen)
    print(
        f"{backbone.name}, {_weights_from(backbone)}: {len(tasks)} dataset(s), {len(chosen)} "
        f"method(s), {trainings} trainings of {protocol.epochs} epoch(s)"
    )
    if runs.ignored:
        print(f"runs.jsonl: ignored a last line cut short, of {runs.ignored} bytes")
    if len(runs):
        print(f"runs.jsonl has {len(runs)} finished trainings: those of these settings are kept")
    print(flush=True)


def _saver(options: argparse.Namespace) -> Callable[[nn.Module, Key], None] | None:
    """Keeps what a method trained, of every run that is tested."""
    if not options.save:
        return None

    def keep(model: nn.Module, key: Key) -> None:
        if not applied(unwrapped(model)):
            return
        name = re.sub(r"\W+", "-", key.method).strip("-").lower()
        save(model, options.output / "models" / key.dataset / f"{name}-{key.seed}")

    return keep


def _weights_from(backbone: Backbone) -> str:
    if backbone.shipped:
        return "as it ships with memtl"
    if backbone.checkpoint:
        return f"weights of {backbone.checkpoint}"
    return "timm's weights" if backbone.pretrained else "random weights"


def _served(
    asked: Sequence[Method], backbone: Backbone, options: argparse.Namespace
) -> tuple[list[Method], dict[str, str]]:
    """The methods that can serve the network, tried on two random images, and why others cannot.

    Raises:
        ValueError: ``--methods`` names one that cannot, or none can.
    """
    with seeded(0):
        images = torch.randn(2, backbone.channels, *2 * [backbone.image_size])
    left_out = {}
    for method in asked:
        try:
            with torch.no_grad():
                method.build(2, 0).to(options.device).eval()(images.to(options.device))
        except (ImportError, NotImplementedError, TypeError, ValueError) as error:
            reason = line(error)
            if options.methods:
                raise ValueError(f"--methods {method.name}: {reason}") from error
            print(f"left out: {method.name}: {reason}", flush=True)
            left_out[method.name] = reason
    if len(left_out) == len(asked):
        raise ValueError(f"no method can train {backbone.name}")
    return [method for method in asked if method.name not in left_out], left_out


def _line(outcome: Outcome) -> str:
    place = f"  {outcome.dataset:22}{outcome.method:28}"
    if outcome.chosen is None:
        return place + DIVERGED
    rate, decay = outcome.chosen
    tested = mean_std([100 * a for a in outcome.tested]) if outcome.tested else DIVERGED
    return (
        f"{place}{tested:>12} %   learning rate {rate:g}, weight decay {decay:g} "
        f"({percent(outcome.val_accuracy)} % in validation)"
    )


def _dataset(task: VtabTask) -> dict[str, Any]:
    """For the record; classes are those of the table, or were counted."""
    return {
        "group": task.group,
        "classes": task.num_classes,
        "classes_from": "VTAB-1k" if task.group != OTHER else "the largest label, and one more",
        "data": task.data,
        **{name: len(getattr(task, name)) for name in ("train", "val", "trainval", "test")},
    }


def _way(method: Method, task: VtabTask, batch: int, device: str) -> Way:
    index = torch.arange(batch)
    return Way(
        lambda: method.build(task.num_classes, 0).to(device),
        task.train.images[index].to(device),
        task.train.labels[index].to(device),
    )


def _protocol(options: argparse.Namespace) -> Protocol:
    default = Protocol()
    seeds = default.seeds[:QUICK_SEEDS] if options.quick else default.seeds
    epochs = QUICK_EPOCHS if options.quick else default.epochs
    return Protocol(
        epochs if options.epochs is None else options.epochs,
        options.batch_size,
        tuple(options.seeds or seeds),
        options.search_seed,
    )


def _methods(options: argparse.Namespace, possible: Sequence[Method]) -> list[Method]:
    """Those asked for, with grids of one size."""
    known = {method.name: method for method in possible}
    for name in options.methods or ():
        if name not in known:
            raise ValueError(f"--methods {name}: unknown, known are {', '.join(known)}")
    chosen = [known[name] for name in dict.fromkeys(options.methods or known)]
    if options.grid:
        chosen = [dataclasses.replace(method, grid=options.grid) for method in chosen]
    if options.weight_decays:
        decays = tuple(options.weight_decays)
        chosen = [dataclasses.replace(m, grid=Grid(m.grid.learning_rates, decays)) for m in chosen]
    sizes = {method.name: len(method.grid) for method in chosen}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"methods are compared over grids of one size, not {listed}: give --grid")
    if options.quick and not options.grid:
        chosen = [
            dataclasses.replace(m, grid=Grid(m.grid.learning_rates[-2:], m.grid.weight_decays[-1:]))
            for m in chosen
        ]
    return chosen


def _caches(options: argparse.Namespace) -> Caches:
    if not options.cache_gib >= 0:  # nan too
        raise ValueError(f"--cache-gib must be at least 0, got {options.cache_gib:g}")
    return Caches(options.output / "cache", options.cache_gib * GIB)


def _check_data(options: argparse.Namespace) -> None:
    if options.data is None:
        for option in ("datasets", "normalise"):
            if getattr(options, option):
                raise ValueError(f"--{option} is for the images of --data")
    elif options.normalise is None:
        raise ValueError(
            f"--data needs --normalise ({', '.join(NORMALISATIONS)}): what the network was "
            "pre-trained with"
        )


def _tasks(options: argparse.Namespace, size: int) -> list[VtabTask]:
    if options.data is None:
        return [load_digits_vtab(size)]
    names = dict.fromkeys(options.datasets or datasets(options.data))
    return [load_vtab(options.data, n, normalise=options.normalise, size=size) for n in names]


def _grid(text: str) -> Grid:
    """``lr=1,.5,wd=1e-3,0`` as a grid."""
    values: dict[str, list[float]] = {}
    name = ""
    try:
        for part in text.split(","):
            before, equals, number = part.rpartition("=")
            name = before if equals else name
            values.setdefault(name, []).append(float(number))
        if set(values) != {"lr", "wd"}:
            raise ValueError("lr and wd are wanted")
        return Grid(tuple(values["lr"]), tuple(values["wd"]))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not like lr=1,.5,wd=1e-3,0: {error}"
        ) from None


def _parser() -> argparse.ArgumentParser:
    default, grid = Protocol(), Grid()
    parser = argparse.ArgumentParser(
        prog="memtl vtab",
        description="Compare ways to fine-tune a network on VTAB-1k by its published protocol: "
        "learning rate and weight decay by search on 800 / 200 images, then several runs on all "
        "1000, tested once. Without --data, on handwritten digits, with no download. What is "
        "finished is kept in DIR/runs.jsonl: ended at any time, the command goes on where it was.",
    )
    parser.add_argument(
        "--data", type=Path, metavar="ROOT",
        help="folder of VTAB-1k: ROOT/<dataset>/ with images, train800.txt, val200.txt, "
        "train800val200.txt and test.txt",
    )  # fmt: skip
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME",
        help=f"folders of ROOT (all of them); {len(DATASETS)} are VTAB-1k's: {', '.join(DATASETS)}",
    )  # fmt: skip
    parser.add_argument(
        "--normalise", choices=NORMALISATIONS,
        help="mean and deviation that the network was pre-trained with; needed with --data",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="of the images (what the network is made for)"
    )
    parser.add_argument(
        "--model", default=SHIPPED, metavar="NAME",
        help=f"one that ships with memtl ({', '.join(assets.names())}) or a timm name ({SHIPPED})",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained", action="store_true", help="download timm's weights for that model"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="weights for that timm model; with neither they are random",
    )  # fmt: skip
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="some of the methods (all that the model can be trained by; LoRA needs peft); others "
        "that cannot serve the model are left out, one named here ends the command",
    )
    parser.add_argument(
        "--grid", type=_grid, metavar="lr=...,wd=...",
        help=f"candidates for every method (each has its own; {grid}, where what trains is new)",
    )  # fmt: skip
    parser.add_argument(
        "--weight-decays", type=float, nargs="+", metavar="X",
        help="candidates in the place of those in each method's grid",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=int, metavar="N", help=f"of each training ({default.epochs})"
    )
    parser.add_argument(
        "--batch-size", type=int, default=default.batch_size, metavar="N",
        help=f"images a step ({default.batch_size})",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED",
        help=f"of the runs that are tested ({' '.join(map(str, default.seeds))})",
    )  # fmt: skip
    parser.add_argument(
        "--search-seed", type=int, default=default.search_seed, metavar="SEED",
        help=f"of the search ({default.search_seed})",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs", "vtab"), metavar="DIR",
        help="where runs.jsonl, vtab.json, vtab.html and caches are written (runs/vtab)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-gib", type=float, default=CACHE_GIB, metavar="N",
        help="of a split of VQT's training or validation images, what the frozen network gives is "
        f"computed once and kept in DIR/cache, where it takes at most N GiB ({CACHE_GIB}); 0: "
        "never. A ViT-B's is 14 MiB an image",
    )  # fmt: skip
    parser.add_argument(
        "--save", action="store_true",
        help="keep what was trained, of every run that is tested, in DIR/models, where memtl.load "
        "finds it; not of LoRA alone (it is peft's) and of full fine-tuning, nor of runs that are "
        "finished already",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="see it work: an epoch, two candidates and two seeds, few measurements",
    )  # fmt: skip
    return parser
