"""`make bench-training`: whole fine-tuning steps on the CPU, stock, checkpointed and converted.

    python benchmarks/training/table.py [--threads N] [--only MODEL] [--quick] [--unchecked]

Forward, loss, backward and AdamW on every parameter that trains, in float32; what is trained and
how is listed in workloads.py. First the tests of what is measured run; where one fails nothing is.
The modes of a model take turns in one process, and the medians of their steps are compared. The
peak is the growth of the resident set over a step: activations, gradients and temporaries. All
models together are written to results/training-<processor>.json.
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels import harness  # noqa: E402
from benchmarks.training.steps import SEED, format_rows, measure  # noqa: E402
from benchmarks.training.workloads import PAIRS, QUICK_PAIRS, WORKLOADS  # noqa: E402

TESTS = ("tests/autograd", "tests/nn")
SECONDS = 60.0  # of turns, for one model


def tests_pass() -> bool:
    """Whether the tests of what is measured pass; what pytest says is printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *TESTS]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch and of the kernels")
    parser.add_argument(
        "--only",
        choices=dict.fromkeys(w.model for w in WORKLOADS),
        metavar="MODEL",
        help="%(choices)s",
    )
    parser.add_argument("--quick", action="store_true", help="a few turns on small batches")
    parser.add_argument(
        "--unchecked", action="store_true", help="skip the tests; the result is marked"
    )
    parser.add_argument("--output", type=Path, help="JSON; default for all models: results/")
    options = parser.parse_args()
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.quick and options.only:
        parser.error("--quick has models of its own: leave --only out")
    try:
        libraries = {name: version(name) for name in ("timm", "transformers")}
    except PackageNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install memtl[models]")
    if not options.unchecked and not tests_pass():
        print(f"{' and '.join(TESTS)} do not pass: nothing is measured", file=sys.stderr)
        return 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    wanted = [options.only] if options.only else [w.model for w in WORKLOADS]
    if not options.quick and not options.only:  # part of a table does not replace the whole
        options.output = options.output or harness.result_path("training")
    record = harness.environment("cpu", SEED)
    record |= {**libraries, "unchecked": options.unchecked, "rows": []}
    print(f"{record['cpu']}, {record['threads']} threads, {record['backends']}")
    seconds = 0.0 if options.quick else SECONDS
    pairs = QUICK_PAIRS if options.quick else [pair for pair in PAIRS if pair[0].model in wanted]
    for rows in measure(pairs, "cpu", harness.cpu_timer, seconds):
        print(f"\n{format_rows(rows, 'float32')}", flush=True)
        record["rows"] += rows
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {harness.relative(str(options.output.resolve()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
