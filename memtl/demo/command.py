"""The command: options, runs, what is printed and written."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import assets
from ..methods import BackRazorConfig
from ..report import Table, check_device, environment, mean_std
from ..report.arguments import count, writable
from ..tasks import Task
from ..training import Settings
from .experiments import EXPERIMENTS, FULL, Experiment, Method, methods
from .page import page
from .results import SCORES, Result, figures, measure, table, train

EXTRAS = {"timm": "timm", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
QUICK_STEPS = 4
ROUNDS, QUICK_ROUNDS = 10, 2
TUNING_SEEDS = (100, 101, 102)
"""Not those of the comparison."""


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns the exit status: 0, 1 for a failed run, 2 for a wrong call."""
    missing = [name for module, name in EXTRAS.items() if not importlib.util.find_spec(module)]
    if missing:
        print(f"memtl demo needs {', '.join(missing)}: pip install memtl[demo]", file=sys.stderr)
        return 2
    options = _parse(argv)
    experiment = EXPERIMENTS[options.model, options.task]
    try:
        task = experiment.load_task()
        if options.tune:
            return _tune(experiment, task, options)
        return _compare(experiment, task, options, shlex.join(["memtl", "demo", *argv]))
    except FloatingPointError as error:
        print(f"memtl demo: {error}", file=sys.stderr)
        return 1
    except ImportError as error:  # of what one network alone needs
        print(f"memtl demo: {error}", file=sys.stderr)
        return 2


def _steps(experiment: Experiment, options: argparse.Namespace) -> int:
    return options.steps or (QUICK_STEPS if options.quick else experiment.steps)


def _announce(experiment: Experiment, task: Task, options: argparse.Namespace, what: str) -> None:
    where = environment(options.device)
    print(
        f"{experiment.asset}, {task.name} ({len(task.train)} samples): {what} of "
        f"{_steps(experiment, options)} steps of {experiment.batch_size}\n"
        f"on {where['device']}, {where['threads']} threads; "
        f"operators by {', '.join(sorted(set(where['backends'].values())))}\n",
        flush=True,
    )


def _compare(experiment: Experiment, task: Task, options: argparse.Namespace, command: str) -> int:
    steps = _steps(experiment, options)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    seeds = list(range(options.seeds))
    chosen = methods(experiment, options.keep)
    score = SCORES[task.metric]
    whole = experiment.load_model(task.num_classes)
    settings = dataclasses.asdict(Settings(steps=steps, batch_size=experiment.batch_size))
    del settings["learning_rate"], settings["seed"]  # each result has its own
    record: dict[str, Any] = {
        "command": command,
        "environment": environment(options.device),
        "task": {"name": task.name, "metric": task.metric, "train": len(task.train)}
        | {"val": len(task.val), "test": len(task.test)},
        "model": {
            "name": experiment.asset,
            "sha256": assets.sha256(experiment.asset),
            "parameters": sum(p.numel() for p in whole.parameters()),
        },
        "settings": settings,
        "rounds": rounds,
        "seeds": seeds,
    }
    _announce(experiment, task, options, f"{len(chosen)} methods, {len(seeds)} run(s) each")
    started = time.perf_counter()
    results = measure(experiment, task, chosen, rounds, options.device, None)
    for seed in seeds:
        for method, result in zip(chosen, results, strict=True):
            _run(experiment, task, method, result, seed, steps, options)
            print(f"  seed {seed}  {method.name:22} {100 * result.test_score[-1]:5.1f} % {score}")
    record["wall_seconds"] = time.perf_counter() - started
    print(f"\n{table(results, score)}\n\nratios to {FULL}; {record['wall_seconds']:.0f} s in all")
    if options.quick:
        print("a quick run: too short for its scores and times to mean anything")
    if options.json:
        base = next(r for r in results if r.name == FULL)
        record["methods"] = [figures(r, base) for r in results]
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"report: {page(results, experiment, score, record).write(options.html)}")
    return 0


def _run(
    experiment: Experiment,
    task: Task,
    method: Method,
    result: Result,
    seed: int,
    steps: int,
    options: argparse.Namespace,
) -> None:
    """One run, appended to ``result``."""
    val, test, losses = train(
        experiment, task, method, learning_rate=result.learning_rate, seed=seed, steps=steps,
        device=options.device,
    )  # fmt: skip
    result.val_score.append(val)
    result.test_score.append(test)
    result.losses.append(losses)


def _tune(experiment: Experiment, task: Task, options: argparse.Namespace) -> int:
    """The first method of each kind with each candidate, on the validation split."""
    first: dict[str, Method] = {}
    for method in methods(experiment, options.keep):
        first.setdefault(method.kind, method)
    seeds = TUNING_SEEDS[: options.seeds] if options.seeds < len(TUNING_SEEDS) else TUNING_SEEDS
    _announce(experiment, task, options, f"{len(first)} kinds, {len(seeds)} run(s) a candidate")
    rows = []
    for kind, method in first.items():
        rate = experiment.rates[kind]
        for candidate in rate.candidates:
            scores = [
                train(
                    experiment, task, method, learning_rate=candidate, seed=seed,
                    steps=_steps(experiment, options), device=options.device, test=False,
                )[0]
                for seed in seeds
            ]  # fmt: skip
            row = (method.name, f"{candidate:g}", mean_std([100 * s for s in scores]))
            rows.append((*row, "taken" if candidate == rate.chosen else ""))
            print(f"  {method.name:22} {candidate:g}: {100 * statistics.fmean(scores):.1f} %")
    header = ("method", "learning rate", f"validation {SCORES[task.metric]} %", "")
    print(f"\n{Table(header, tuple(rows))}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    models, tasks = ([*dict.fromkeys(pair[i] for pair in EXPERIMENTS)] for i in (0, 1))
    parser = argparse.ArgumentParser(
        prog="memtl demo",
        description="Fine-tune a shipped network several ways, and compare accuracy, memory and "
        "time. Needs no download; a few minutes on two cores.",
    )
    parser.add_argument(
        "--model", choices=models, default="vit",
        help="a vision transformer, a MobileNetV2, or a BERT (vit)",
    )  # fmt: skip
    parser.add_argument(
        "--task", choices=tasks, default="digits",
        help="handwritten digits, or the digit of every pixel where several are scattered; "
        "with bert: what docstrings are about, or masked words in them (digits)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=count, default=1, metavar="N", help="runs a method (1)")
    parser.add_argument(
        "--steps", type=count, metavar="N", help="steps a run (120; segmentation and bert 240)"
    )
    parser.add_argument(
        "--keep", type=_fraction, nargs="+", default=[0.1, 0.03], metavar="FRACTION",
        help="what Back Razor keeps of a linear layer's input (0.1 0.03)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--json", type=writable, metavar="PATH", help="write every figure there too"
    )
    parser.add_argument(
        "--html", type=writable, default="demo.html", metavar="PATH", help="the report (demo.html)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"see it work: {QUICK_STEPS} steps, few measurements"
    )
    parser.add_argument(
        "--tune", action="store_true",
        help="instead, the learning rates: every candidate's score on the validation split, up to "
        f"{len(TUNING_SEEDS)} runs each (--seeds)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if (options.model, options.task) not in EXPERIMENTS:
        parser.error(f"--task {options.task} is not for --model {options.model}")
    try:
        check_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


def _fraction(text: str) -> float:
    try:
        return BackRazorConfig(keep=float(text)).keep
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
