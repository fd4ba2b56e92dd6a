"""`make gpu`, after its tests: every operator on an NVIDIA GPU, and a training step of a ViT-B/16.

    python benchmarks/gpu.py [--output FILE]
    python benchmarks/gpu.py --device cpu --quick     the same code, small, on a machine without one

Operators: tensors of 64 images, 12608 tokens of 768 or 3072 features, in bfloat16. CUDA events, and
medians of turns taken in one process, each call with a cold L2 cache. GB/s counts each argument and
result once; its share is that of copying 1 GiB on the device. The ratio is the baseline's time over
the operator's.

Training: vit_base_patch16_224, 64 images, autocast to bfloat16, AdamW; stock, with timm's gradient
checkpointing, and with Back Razor (fast, keep 0.1); then VQT beside a forward pass of the frozen
network; LoRA on it, with its frozen layers as PyTorch has them and as memtl does; parts of a frozen
mobilenetv2_100, Rep-Net's among them; steps taking turns. Saved bytes are exact; the peak is the
most that a step needs beyond what is allocated between steps: weights and the optimizer's state.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import memtl  # noqa: E402
from benchmarks.kernels import harness  # noqa: E402
from benchmarks.kernels.cases import all_cases  # noqa: E402
from benchmarks.training.steps import SEED, format_rows, measure  # noqa: E402
from benchmarks.training.workloads import (  # noqa: E402
    CHECKPOINTING,
    FROZEN_MODES,
    LORA_MODES,
    SIDE_MODES,
    STOCK,
    Mode,
    Workload,
)

MODES = (STOCK, CHECKPOINTING, Mode("back razor", config=memtl.BackRazorConfig(keep=0.1)))


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured: everything, or just enough to run every line."""

    model: str
    convolutional: str
    batch: int
    seconds: float  # for one case, and for the training steps of one mode
    copy_bytes: int
    rotate_bytes: int


FULL = Scale("vit_base_patch16_224", "mobilenetv2_100", 64, 1.5, 2**30, 2**28)
QUICK = Scale("vit_tiny_patch16_224", "mobilenetv2_035", 2, 0.0, 2**22, 2**22)


def kernel_rows(
    scale: Scale, device: str, timer: harness.Timer, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Every operator against its baselines."""
    for case in all_cases(scale.batch, device, torch.bfloat16):
        yield from harness.measure(
            case, device, timer, bandwidth, scale.seconds, scale.rotate_bytes
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small and few: a trial of this code")
    parser.add_argument("--output", type=Path, help="default on a GPU: results/gpu-<its name>.json")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py measures an NVIDIA GPU and torch sees none here; "
            "`--device cpu --quick` tries the code out without one",
            file=sys.stderr,
        )
        return 1
    scale = QUICK if options.quick else FULL
    torch.manual_seed(SEED)
    timer = harness.cuda_timer() if device == "cuda" else harness.cpu_timer
    bandwidth = harness.copy_bandwidth(scale.copy_bytes, device, timer)
    record = harness.environment(device, SEED) | {"copy_gb_per_s": bandwidth / 1e9}
    print(f"{record.get('gpu', record['cpu'])}, torch {record['torch']}, {record['backends']}")
    print(f"copy: {bandwidth / 1e9:.0f} GB/s\n\n{harness.HEADER}")
    record["rows"] = []
    for row in kernel_rows(scale, device, timer, bandwidth):
        print(harness.format_row(row), flush=True)
        record["rows"].append(row)
    workload = Workload(scale.model, scale.batch)
    small = Workload(scale.convolutional, scale.batch)
    record["training"] = []
    pairs = [
        (workload, MODES),
        (workload, FROZEN_MODES),
        (workload, LORA_MODES),
        (small, SIDE_MODES),
    ]
    for rows in measure(pairs, device, timer, 3 * scale.seconds, autocast=torch.bfloat16):
        print(f"\n{format_rows(rows, 'autocast bfloat16')}")
        record["training"] += rows
    output = options.output
    if output is None and device == "cuda":
        name = re.sub(r"\W+", "-", record["gpu"]).strip("-").lower()
        output = harness.RESULTS / f"gpu-{name}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {harness.relative(str(output.resolve()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
