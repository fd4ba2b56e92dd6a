"""``memtl tickets``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import memtl

from .. import assets
from ..report import Journal, Table, check_device, environment, mean_std
from ..report.arguments import add_running, count, natural
from ..report.calling import call
from ..training import track
from ..training.pool import Workers
from . import estimate
from .experiments import (
    CLIP_NORM,
    DOCSTRINGS,
    ROUND,
    TASKS,
    UNIVERSAL,
    Key,
    Run,
    Setup,
    encoder,
    load,
)
from .facts import Facts
from .page import page
from .plan import DENSE, Cell, Plan
from .results import Results
from .verdict import mean
from .work import draw, run

EXTRAS = {"transformers": "transformers", "matplotlib": "matplotlib"}
QUICK = {
    "tasks": ["package", "kind"],
    "steps": 4, "mlm_steps": 4, "seeds": 1, "sparsities": [10, 20], "control_sparsities": [20],
    "transfer_sparsity": 20,
}  # fmt: skip
DEFAULTS = {
    "tasks": [*DOCSTRINGS],
    "steps": None, "mlm_steps": UNIVERSAL.steps, "seeds": 3, "sparsities": [*Plan.sparsities],
    "control_sparsities": [*Plan.controls], "transfer_sparsity": Plan.transfer,
}  # fmt: skip
TUNING_SEEDS = (100, 101)
"""Not those of the experiment."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0, 1 where a ticket's training diverged or a
    process died, 2 for a wrong call."""
    return call("memtl tickets", EXTRAS, "memtl[models,demo]", lambda: _run(_parse(argv), argv))


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    plan = Plan(
        tuple(options.tasks),
        options.seeds,
        tuple(options.sparsities),
        tuple(options.control_sparsities),
        options.transfer_sparsity,
        universal=options.mlm_steps > 0,
        permuted=options.permuted,
    )
    check_device(options.device)
    model = options.model or str(assets.encoder())
    setup = Setup(
        model, options.out, max(plan.sparsities), options.steps, options.batch_size,
        options.mlm_steps, options.device,
    )  # fmt: skip
    for task in plan.sources:  # before anything is written
        load(task, model)
    if plan.universal:
        _check_masked_words(model)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with Workers(options.jobs) as workers, Journal(options.out / "runs.jsonl", Run) as journal:
        if journal.ignored:
            print(f"runs.jsonl: ignored a last line cut short, of {journal.ignored} bytes")
        if options.tune:
            return _tune(setup, plan, journal, workers)
        cells = {cell: setup.key(cell) for cell in plan.cells()}
        left = {cell: key for cell, key in cells.items() if journal.find(key) is None}
        _announce(setup, plan, cells, left, journal, options)
        if options.plan:
            return 0
        keys = [*left.values()]
        dense = [key for key in keys if key.scheme == DENSE]
        _fine_tune(setup, dense, journal, workers)
        _draw(setup, plan, workers)
        _fine_tune(setup, [key for key in keys if key.scheme != DENSE], journal, workers)
        results = Results(plan, {cell: _found(journal, key).score for cell, key in cells.items()})
        run_seconds = sum(_found(journal, key).seconds for key in cells.values())
    facts = Facts.of(setup, results)
    record = _record(setup, plan, argv, options) | {
        "run_seconds": run_seconds,
        "wall_seconds": time.perf_counter() - started,
        **results.figures(),
        "tickets": facts.figures(),
    }
    _print(results, facts)
    if options.quick:
        print("a quick run: too short for its scores to mean anything")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"report: {page(results, facts, record).write(options.out / 'report.html')}")
    return 0


def _check_masked_words(model: str) -> None:
    try:
        encoder(model).build("mlm", 2, 0)
    except ValueError as error:
        raise ValueError(f"{error}: --mlm-steps 0 leaves the universal ticket out") from error


def _found(journal: Journal[Run], key: Key) -> Run:
    found = journal.find(key)
    assert found is not None
    return found


def _announce(
    setup: Setup,
    plan: Plan,
    cells: dict[Cell, Key],
    left: dict[Cell, Key],
    journal: Journal[Run],
    options: argparse.Namespace,
) -> None:
    """Say what there is to do; with ``--plan`` also how long that would take."""
    phases = (("dense", plan.dense()), ("tickets", plan.schemes()), ("transfer", plan.transfers()))
    seen: set[Cell] = set()
    rows = []
    for name, its in phases:
        new = {*its} - seen
        seen |= new
        rows.append((f"{name}, runs", str(len(new)), str(len(new & left.keys()))))
    rounds = len(setup.rounds().rounds())
    undrawn = sum(setup.rounds_left(source) for source in plan.sources)
    rows.append(("rounds of tickets", str(rounds * len(plan.sources)), str(undrawn)))
    print(f"{setup.model}: {len(plan.tasks)} tasks, {len(cells)} runs")
    print(Table(("", "in all", "left"), tuple(rows)))
    if options.plan:
        seconds = estimate.seconds(setup, [*left.values()], plan.sources, journal)
        jobs = f" by {options.jobs} jobs" if options.jobs > 1 else ""
        print(f"\nabout {seconds / options.jobs / 60:.1f} minutes{jobs}")
    print(flush=True)


def _fine_tune(setup: Setup, keys: Sequence[Key], journal: Journal[Run], workers: Workers) -> None:
    """Do runs, and write each to the journal when it is finished."""
    calls = [(setup, key) for key in keys]
    with track(workers.each(run, calls), "fine-tuning", total=len(calls)) as bar:
        for done in bar:
            journal.add(done)
            bar.write(_line(done), file=sys.stdout)


def _line(done: Run) -> str:
    key = done.key
    ticket = DENSE if key.scheme == DENSE else f"{key.scheme} {key.sparsity} %"
    of = f" of {key.source}" if key.source else ""
    score = f"{100 * done.score:5.1f} %" if done.score is not None else f"diverged: {done.error}"
    return f"  {key.task:12}{ticket + of:28}seed {key.seed}  {score}  {done.seconds:.0f} s"


def _draw(setup: Setup, plan: Plan, workers: Workers) -> None:
    """Draw the tickets of every source that are not there."""
    sources = [source for source in plan.sources if setup.rounds_left(source)]
    progress = None if workers.jobs == 1 else False
    calls = [(setup, source, progress) for source in sources]
    for _ in track(workers.each(draw, calls), "drawing tickets", total=len(calls)):
        pass


def _print(results: Results, facts: Facts) -> None:
    for task in results.plan.tasks:
        print(f"\n{results.accuracies(task)}")
    print(
        "\nmean ± standard deviation of the test scores in %, by sparsity\n\n"
        f"{results.matching()}\n\n"
        "matching: the mean is not below the bound, the dense mean less one standard deviation\n\n"
        f"{results.transfer_table()}\n\n"
        f"tickets of {results.plan.transfer} %: mean score less that of the dense runs, in points\n"
    )
    for line in results.universal():
        print(line)
    print(f"\n{facts.overlap_table()}\n\n{facts.size()}\n")


def _record(
    setup: Setup, plan: Plan, argv: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """What the figures are from."""
    backbone = encoder(setup.model).build("classifier", 2, 0).model.base_model
    recipes = {source: setup.recipe(source) for source in plan.sources}
    return {
        "command": shlex.join(["memtl", "tickets", *argv]),
        "environment": environment(setup.device),
        "quick": options.quick,
        "model": {
            "name": Path(setup.model).name,
            "sha256": encoder(setup.model).fingerprint,
            "parameters": sum(p.numel() for p in backbone.parameters()),
        },
        "plan": dataclasses.asdict(plan),
        "constants": {"amount": ROUND, "clip": CLIP_NORM},
        "recipes": {
            source: {
                "steps": recipe.steps, "batch_size": recipe.batch_size,
                "learning_rate": recipe.learning_rate, "max_length": recipe.max_length,
            }
            for source, recipe in recipes.items()
        },
        "tasks": {task: _about(setup, task) for task in plan.tasks},
        "memtl": memtl.__version__,
    }  # fmt: skip


def _about(setup: Setup, name: str) -> dict[str, Any]:
    task = load(name, setup.model)
    sizes = {split: len(getattr(task, split)) for split in ("train", "val", "test")}
    return {"classes": task.num_classes, "metric": task.metric.replace("_", " "), **sizes}


def _tune(setup: Setup, plan: Plan, journal: Journal[Run], workers: Workers) -> int:
    """The dense encoder with each candidate rate, on the validation split."""
    seeds = TUNING_SEEDS[: plan.seeds]
    wanted = {
        (task, rate): [
            setup.key(Cell(task, DENSE, "", 0, seed), split="val", learning_rate=rate)
            for seed in seeds
        ]
        for task in plan.tasks
        for rate in setup.recipe(task).candidates
    }
    left = [key for keys in wanted.values() for key in keys if journal.find(key) is None]
    _fine_tune(setup, left, journal, workers)
    rows = []
    for (task, rate), keys in wanted.items():
        scores = [score for key in keys if (score := _found(journal, key).score) is not None]
        whole = mean([_found(journal, key).score for key in keys]) is not None
        taken = "taken" if rate == setup.recipe(task).learning_rate else ""
        text = mean_std([100 * s for s in scores]) if whole else "diverged"
        rows.append((task, f"{rate:g}", text, taken))
    print(f"\n{Table(('task', 'learning rate', 'validation score %', ''), tuple(rows))}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memtl tickets",
        description="Lottery tickets of a pre-trained encoder (Chen et al., NeurIPS 2020): which "
        "of its subnetworks do as well as the whole of it, and on which tasks. Needs no download. "
        "Interrupted, it goes on where it was.",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a folder or name that transformers loads (the shipped one)"
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)} ({' '.join(DOCSTRINGS)})"
    )
    parser.add_argument("--seeds", type=count, metavar="N", help="runs a cell (3)")
    _percents(parser, "--sparsities", "of tickets, in %% (30 40 50 60 70)")
    _percents(parser, "--control-sparsities", "of random and shuffled ones (30 50 70)", "*")
    parser.add_argument(
        "--transfer-sparsity", type=int, metavar="PERCENT",
        help="at which every ticket is tried on every task (70)",
    )  # fmt: skip
    parser.add_argument(
        "--permuted", action="store_true",
        help="also tickets on permuted weights, at the largest control sparsity",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=count, metavar="N", help="of a run, and of a round (those of the task)"
    )
    parser.add_argument(
        "--mlm-steps", type=natural, metavar="N",
        help=f"of a round of the universal ticket; 0: there is none ({UNIVERSAL.steps})",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=count, metavar="N", help="of a fine-tuning (32)")
    add_running(parser, "tickets-runs")
    parser.add_argument(
        "--quick", action="store_true", help="see it work: a few steps, two tasks, one seed"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--plan", action="store_true", help="instead, what there is to do and how long it takes"
    )
    instead.add_argument(
        "--tune", action="store_true",
        help="instead, the learning rates: every candidate's score on the validation split, up to "
        f"{len(TUNING_SEEDS)} runs each (--seeds)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _percents(parser: argparse.ArgumentParser, name: str, text: str, many: str = "+") -> None:
    parser.add_argument(name, type=int, nargs=many, metavar="PERCENT", help=text)
