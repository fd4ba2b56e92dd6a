"""`make bench`: every operator on the CPU against its named baselines, measured side by side.

    python benchmarks/kernels/table.py [--threads N] [--only topk] [--isa avx2] [--quick]
                                       [--unchecked]

Tensors are those of a ViT-B/16 on 8 images, 1576 tokens of 768 or 3072 features, and of a
ResNet-50's convolutions, float32. First the
kernels' own tests run; where one fails nothing is measured. GB/s counts each argument and result
once; its share is that of copying a 1576x3072 tensor, by `Tensor.copy_`, with the same threads. The
ratio is the baseline's time over the operator's, both medians of turns taken in one process. The
table is measured in every instruction set of this machine, the best first; PyTorch, and so the
baselines, always run in the best one. Then follows what a converted layer costs a call beyond its
arithmetic: see overhead.py.
"""

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels import harness, overhead  # noqa: E402
from benchmarks.kernels.cases import FAMILIES, TOKENS  # noqa: E402

BATCH = 8
SEED = 0
TESTS = "tests/csrc"


def kernels_pass() -> bool:
    """Whether the kernels' tests pass; what pytest says is printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", TESTS]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def instruction_sets(only: str | None) -> list[str]:
    """Those to measure, the best first; of memtl without native kernels, the one that is none."""
    try:
        native = importlib.import_module("memtl._C")
    except ImportError:
        return ["none"]
    if only is not None and only not in native.isas():
        raise SystemExit(f"--isa: this machine runs {', '.join(native.isas())}, not {only}")
    return [only] if only else native.isas()[::-1]


@contextlib.contextmanager
def using(isa: str) -> Iterator[None]:
    """The native kernels run in this instruction set inside."""
    if isa == "none":
        yield
        return
    native = importlib.import_module("memtl._C")
    before = native.isa()
    native.set_isa(isa)
    try:
        yield
    finally:
        native.set_isa(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch and of the kernels")
    parser.add_argument("--only", choices=FAMILIES, help="one family of operators")
    parser.add_argument("--isa", help="one instruction set: portable, avx2, avx512")
    parser.add_argument("--quick", action="store_true", help="a few turns on one image")
    parser.add_argument(
        "--unchecked", action="store_true", help="skip the kernels' tests; the result is marked"
    )
    parser.add_argument("--output", type=Path, help="JSON; default for the whole table: results/")
    options = parser.parse_args()
    isas = instruction_sets(options.isa)
    if not (options.only or options.isa or options.quick):  # a part does not replace the whole
        options.output = options.output or harness.result_path("kernels")
    if not options.unchecked and not kernels_pass():
        print(f"{TESTS} does not pass: nothing is measured", file=sys.stderr)
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    batch, seconds = (1, 0.0) if options.quick else (BATCH, 3.0)
    bandwidth = harness.copy_bandwidth(batch * TOKENS * 3072 * 4, "cpu", harness.cpu_timer)
    record = harness.environment("cpu", SEED)
    record |= {"unchecked": options.unchecked, "copy_gb_per_s": bandwidth / 1e9, "rows": []}
    print(f"{record['cpu']}, {record['threads']} threads, {record['backends']}")
    print(f"copy: {bandwidth / 1e9:.1f} GB/s")
    for isa in isas:
        print(f"\n{isa}\n{harness.HEADER}")
        with using(isa):
            for family in [options.only] if options.only else FAMILIES:
                for case in FAMILIES[family](batch, "cpu", torch.float32):
                    rows = harness.measure(case, "cpu", harness.cpu_timer, bandwidth, seconds)
                    if isa != "none" and rows[0]["served_by"] != "native-cpu" and isa != isas[0]:
                        continue  # it is the same again
                    print("\n".join(map(harness.format_row, rows)), flush=True)
                    record["rows"] += [{"isa": isa, **row} for row in rows]
    if not options.only:
        record["overhead"] = overhead.measure(harness.cpu_timer, seconds / 2)
        print(f"\n{overhead.format_rows(record['overhead'])}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {harness.relative(str(options.output.resolve()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
