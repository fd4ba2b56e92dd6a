"""`make bench`: every operator on the CPU against its named baselines, measured side by side.

    python benchmarks/kernels/table.py [--threads N] [--only topk] [--quick] [--unchecked]

Tensors are those of a ViT-B/16 on 8 images, 1576 tokens of 768 or 3072 features, and of a
ResNet-50's convolutions, float32. First the
kernels' own tests run; where one fails nothing is measured. GB/s counts each argument and result
once; its share is that of copying a 1576x3072 tensor, by `Tensor.copy_`, with the same threads. The
ratio is the baseline's time over the operator's, both medians of turns taken in one process.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels import harness  # noqa: E402
from benchmarks.kernels.cases import FAMILIES, TOKENS  # noqa: E402

BATCH = 8
SEED = 0
TESTS = "tests/csrc"


def kernels_pass() -> bool:
    """Whether the kernels' tests pass; what pytest says is printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", TESTS]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch and of the kernels")
    parser.add_argument("--only", choices=FAMILIES, help="one family of operators")
    parser.add_argument("--quick", action="store_true", help="a few turns on one image")
    parser.add_argument(
        "--unchecked", action="store_true", help="skip the kernels' tests; the result is marked"
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "cpu-kernels.json")
    options = parser.parse_args()
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
    print(f"copy: {bandwidth / 1e9:.1f} GB/s\n\n{harness.HEADER}")
    for family in [options.only] if options.only else FAMILIES:
        for case in FAMILIES[family](batch, "cpu", torch.float32):
            rows = harness.measure(case, "cpu", harness.cpu_timer, bandwidth, seconds)
            print("\n".join(map(harness.format_row, rows)), flush=True)
            record["rows"] += rows
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {harness.relative(str(options.output.resolve()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
