"""``memtl doublewin``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import memtl

from ..report import Journal, Table, check_device, environment, mean_std
from ..report.arguments import add_running, count
from ..report.calling import call
from ..training import track
from ..training.pool import Workers
from . import domain as domains
from .domain import DATA, DIGITS, SHIPPED, SUBSETS, Domain
from .experiments import CANDIDATES, EPS, EPS_PICTURES, STEPS, Key, Recipe, Run, Setup
from .gap import gaps
from .page import gap_table, page
from .plan import DENSE, DRAWINGS, REGIMES, SOURCE, Cell, Draw, Plan, sparsity
from .results import MISSING, Results
from .work import draw, run

EXTRAS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "timm": "timm"}
TUNING_SEEDS = (100, 101)
"""Not those of the experiment."""

QUICK = {"drawings": ["one-shot"], "levels": [4], "percents": [10], "seeds": 1, "steps": 3}
DEFAULTS = {
    "drawings": [*Plan.drawings], "levels": [*Plan.levels], "percents": [*Plan.percents],
    "seeds": Plan.seeds,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 where the drawing of a ticket diverged or a
    process died, 2 for a wrong call."""
    return call("memtl doublewin", EXTRAS, "memtl[demo]", lambda: _run(_parse(argv), argv))


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    check_device(options.device)
    named = [name.partition("=") for name in options.pretrainings]
    networks = tuple((name, path) for name, sign, path in named if sign)
    if networks and len(networks) < len(named):
        raise ValueError("pre-trainings are either shipped ones or NAME=PATH, not both")
    domain = Domain(
        options.data, options.root, networks, options.arch, options.size, options.subset
    )
    setup = Setup(options.out, domain, _recipe(options), options.device)
    plan = Plan(
        tuple(name for name, _, _ in named), tuple(options.drawings), tuple(options.levels),
        tuple(options.regimes), tuple(options.percents), options.seeds,
    )  # fmt: skip
    if not domain.has_source:
        others = [name for name, drawing in DRAWINGS.items() if drawing.data != SOURCE]
        if on_source := [name for name in plan.drawings if name not in others]:
            raise ValueError(
                f"--drawings {' '.join(on_source)} ask for the images that networks were "
                f"pre-trained on, which are not here; {', '.join(others)} do not"
            )
    Results(plan, {}, options.tolerance / 100, options.reference)  # before anything is written
    draws = {cell: plan.draw(cell) for cell in plan.cells()}
    cells = {cell: setup.key(cell, what) for cell, what in draws.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with Workers(options.jobs) as workers, Journal(options.out / "runs.jsonl", Run) as journal:
        if journal.ignored:
            print(f"runs.jsonl: ignored a last line cut short, of {journal.ignored} bytes")
        if options.tune:
            return _tune(setup, plan, journal, workers)
        left = {cell: key for cell, key in cells.items() if journal.find(key) is None}
        _announce(plan, cells, left, journal, options)
        if options.plan:
            return 0
        if not options.report:
            _do(setup, left, draws, journal, workers)
        runs = {cell: done for cell, key in cells.items() if (done := journal.find(key))}
    if not runs:
        raise ValueError(f"{options.out} has no finished run of this grid")
    results = Results(plan, runs, options.tolerance / 100, options.reference)
    record = _record(setup, plan, argv, options) | {
        "run_seconds": sum(run.seconds for run in runs.values()),
        "wall_seconds": time.perf_counter() - started,
        "missing": len(cells) - len(runs),
        "domain_gap": {
            name: dataclasses.asdict(gap) for name, gap in gaps(domain, plan.pretrainings).items()
        },
        **results.figures(),
    }
    _print(results, record)
    if record["missing"]:
        print(f"{record['missing']} of {len(cells)} runs are not finished: {MISSING} in the tables")
    if options.quick:
        print("a quick run: too short for its figures to mean anything")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"report: {page(results, record).write(options.out / 'report.html')}")
    return 0


def _recipe(options: argparse.Namespace) -> Recipe:
    given: dict[str, Any] = {
        "steps": options.steps, "learning_rate": options.learning_rate, "eps": options.eps,
        "batch_size": options.batch_size, "round_steps": options.round_steps,
    }  # fmt: skip
    if options.eps is None and options.data != DIGITS:
        given["eps"] = EPS_PICTURES
    if options.autoattack:
        if importlib.util.find_spec("pyautoattack") is None:
            raise ValueError("--autoattack needs pyautoattack: pip install memtl[robust]")
        given["autoattack"] = True
    if options.quick and options.round_steps is None:
        given["round_steps"] = 2
    return Recipe(**{name: value for name, value in given.items() if value is not None})


def _do(
    setup: Setup,
    left: dict[Cell, Key],
    draws: dict[Cell, Draw | None],
    journal: Journal[Run],
    workers: Workers,
) -> None:
    """First what needs no training before it, then tickets, once they are drawn."""
    calls = {cell: (setup, key, draws[cell]) for cell, key in left.items()}
    _transfer([call for cell, call in calls.items() if not draws[cell]], journal, workers)
    _draw(setup, [*dict.fromkeys(draws[cell] for cell in left if draws[cell])], workers)
    _transfer([call for cell, call in calls.items() if draws[cell]], journal, workers)


def _announce(
    plan: Plan,
    cells: dict[Cell, Key],
    left: dict[Cell, Key],
    journal: Journal[Run],
    options: argparse.Namespace,
) -> None:
    """Say what there is to do, and with what there is to go by how long it takes."""
    rows = []
    for drawing, regime in itertools.product((DENSE, *plan.drawings), plan.regimes):
        mine = [c for c in cells if (c.drawing, c.regime) == (drawing, regime)]
        todo = [c for c in mine if c in left]
        seconds = [
            run.seconds
            for run in journal
            if (run.key.drawing, run.key.regime) == (drawing, regime) and run.error is None
        ]
        each = f"{statistics.median(seconds):.0f} s" if seconds else "-"
        rows.append((f"{drawing}, {regime}", str(len(mine)), str(len(todo)), each))
    print(f"{options.data}: {len(cells)} runs, {len(left)} left, {len(plan.draws())} drawings")
    print(Table(("transfer", "in all", "left", "median time"), tuple(rows)))
    print(flush=True)


def _transfer(calls: Sequence[tuple[Any, ...]], journal: Journal[Run], workers: Workers) -> None:
    """Do runs, and write each to the journal when it is finished."""
    with track(workers.each(run, calls), "transfer", total=len(calls)) as bar:
        for done in bar:
            journal.add(done)
            bar.write(_line(done), file=sys.stdout)


def _line(done: Run) -> str:
    key = done.key
    ticket = f" {100 * sparsity(key.level):.1f} %" if key.level else ""
    what = f"{key.pretraining}: {key.drawing}{ticket}"
    how = f"{key.regime}, {key.percent:g} %, seed {key.seed}"
    if done.accuracy is None or done.robust is None:
        return f"  {what:46} {how:32} diverged: {done.error}"
    return (
        f"  {what:46} {how:32} {100 * done.accuracy:5.1f} %  robust {100 * done.robust:5.1f} %  "
        f"{done.seconds:.0f} s"
    )


def _draw(setup: Setup, draws: Sequence[Draw | None], workers: Workers) -> None:
    """Draw the tickets that runs ask for; what is there is found."""
    progress = None if workers.jobs == 1 else False
    calls = [(setup, what, progress) for what in draws]
    for _ in track(workers.each(draw, calls), "drawing tickets", total=len(calls)):
        pass


def _print(results: Results, record: dict[str, Any]) -> None:
    plan = results.plan
    for percent in plan.percents:
        for regime, metric in itertools.product(plan.regimes, ("accuracy", "robust")):
            print(f"\n{metric} in %, {regime} transfer, {percent:g} % of the data\n")
            print(results.table(metric, regime, percent))
    if plan.drawings:
        what = "double wins" if results.double else f"matching under {plan.regimes[0]} transfer"
        print(f"\n{what}, within {results.within}\n\n{results.wins()}\n")
    for line in (*results.verdicts(), "", *results.sentences()):
        print(line)
    if record["domain_gap"]:
        print(f"\n{gap_table(record['domain_gap'])}\n")


def _record(
    setup: Setup, plan: Plan, argv: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """What the figures are from."""
    task = domains.task(setup.domain)
    return {
        "command": shlex.join(["memtl", "doublewin", *argv]),
        "environment": environment(setup.device),
        "quick": options.quick,
        "plan": dataclasses.asdict(plan),
        "sparsities": {str(level): sparsity(level) for level in plan.levels},
        "recipe": dataclasses.asdict(setup.recipe),
        "attacks": {
            "trained with": str(setup.recipe.trained_with),
            "measured by": str(setup.recipe.measured_by),
        },
        "settings": {
            regime: {
                f"{percent:g} %": dataclasses.asdict(setup.settings(regime, percent, 0))
                for percent in plan.percents
            }
            for regime in plan.regimes
        },
        "networks": {
            name: domains.fingerprint_of_network(setup.domain, name) for name in plan.pretrainings
        },
        "data": {
            "name": setup.domain.data, "subset": setup.domain.subset,
            "sizes": {name: len(getattr(task, name)) for name in ("train", "val", "test")},
        },
        "memtl": memtl.__version__,
    }  # fmt: skip


def _tune(setup: Setup, plan: Plan, journal: Journal[Run], workers: Workers) -> int:
    """The whole networks with each candidate rate, on the validation split."""
    seeds = TUNING_SEEDS[: plan.seeds]
    wanted: dict[tuple[str, float, float], list[Key]] = {}
    for regime, percent, rate in itertools.product(plan.regimes, plan.percents, CANDIDATES):
        wanted[regime, percent, rate] = [
            setup.key(
                Cell(pretraining, DENSE, 0, regime, percent, seed), None, split="val", rate=rate
            )
            for pretraining, seed in itertools.product(plan.pretrainings, seeds)
        ]
    left = [key for keys in wanted.values() for key in keys if journal.find(key) is None]
    _transfer([(setup, key, None) for key in left], journal, workers)
    rows = []
    for (regime, percent, rate), keys in wanted.items():
        runs = [done for key in keys if (done := journal.find(key))]
        texts = [
            "diverged" if None in values else mean_std([100 * v for v in values if v is not None])
            for values in ([r.accuracy for r in runs], [r.robust for r in runs])
        ]
        taken = rate == setup.settings(regime, percent, 0).learning_rate
        rows.append((f"{regime}, {percent:g} %", f"{rate:g}", *texts, "taken" if taken else ""))
    header = ("transfer", "learning rate", "accuracy %", "robust %", "")
    print(f"\nvalidation split, mean over the whole networks\n\n{Table(header, tuple(rows))}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memtl doublewin",
        description="Tickets of robustly pre-trained networks (Chen et al., ICML 2022; Fu et al., "
        "DAC 2023): which keep standard and robust accuracy, under standard and adversarial "
        "transfer. Needs no download. Interrupted, it goes on where it was.",
    )
    parser.add_argument(
        "--pretrainings", nargs="+", metavar="NAME", default=[*SHIPPED],
        help=f"of {', '.join(SHIPPED)} (all); for real data NAME=PATH of checkpoints",
    )  # fmt: skip
    parser.add_argument(
        "--drawings", nargs="*", metavar="NAME",
        help=f"of {', '.join(DRAWINGS)} ({' '.join(Plan.drawings)})",
    )  # fmt: skip
    parser.add_argument(
        "--levels", nargs="*", type=count, metavar="K",
        help="of sparsity, 1 - 0.8^K (4 7 10 13: 59.0, 79.0, 89.3 and 94.5 %%)",
    )  # fmt: skip
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=[*REGIMES])
    parser.add_argument(
        "--percents", nargs="+", type=float, metavar="P",
        help="of the training data (100 10 1)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=count, metavar="N", help="runs a cell (3)")
    parser.add_argument(
        "--tolerance", type=float, default=1.0, metavar="POINTS",
        help="how far below the whole network's mean accuracy a matching ticket may be (1)",
    )  # fmt: skip
    parser.add_argument(
        "--reference",
        metavar="NAME",
        default="",
        help="the pre-training to compare others with (the first)",
    )
    parser.add_argument("--data", choices=DATA, default=DIGITS, help=f"the target ({DIGITS})")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="where torchvision finds the data; no download"
    )
    parser.add_argument("--arch", default="resnet50", help="of checkpoints, timm's name (resnet50)")
    parser.add_argument("--size", type=count, default=224, help="of real images, in pixels (224)")
    parser.add_argument(
        "--subset", choices=SUBSETS, default=SUBSETS[0],
        help="parts of the data: as many of each class, or the first images (balanced)",
    )  # fmt: skip
    steps = ", ".join(f"{s} from {p} %%" for p, s in STEPS)
    parser.add_argument("--steps", type=count, metavar="N", help=f"of a transfer ({steps})")
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help="of a transfer")
    parser.add_argument("--batch-size", type=count, metavar="N", help="of everything (64)")
    parser.add_argument(
        "--round-steps", type=count, metavar="N",
        help=f"of a round of a ticket ({Recipe.round_steps})",
    )  # fmt: skip
    parser.add_argument(
        "--eps", type=float, metavar="E",
        help="radius of attacks, in the maximum norm, of pixels in 0..1 "
        f"({EPS}; of pictures 8/255, {EPS_PICTURES:.4f})",
    )  # fmt: skip
    parser.add_argument(
        "--autoattack", action="store_true",
        help="measure by AutoAttack too, which takes many times as long (pyautoattack)",
    )  # fmt: skip
    add_running(parser, "doublewin-runs")
    parser.add_argument(
        "--quick", action="store_true", help="see it work: a few steps, one level, one seed"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="instead, what there is to do")
    instead.add_argument(
        "--report", action="store_true", help="instead, the report on what is finished"
    )
    instead.add_argument(
        "--tune", action="store_true",
        help="instead, the learning rates: every candidate's score on the validation split",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options
