"""`make gpu`'s program, as far as it goes without a GPU: what it looks for and says, its code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import goals, gpu
from benchmarks.kernels import harness
from benchmarks.kernels.cases import all_cases
from benchmarks.training.steps import largest
from benchmarks.training.workloads import GPU_PAIRS
from memtl import _ops

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_it_refuses_without_a_gpu():
    done = run()
    assert done.returncode == 1
    assert "torch sees none here" in done.stderr


@pytest.mark.parametrize("name", ["minutes", "budget-gib"])
def test_it_refuses_no_time_and_no_memory(name):
    done = run(f"--{name}=0")
    assert done.returncode == 2
    assert f"--{name} must be above 0, got 0.0" in done.stderr


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 63, 64, 65, 100, 1000, 20_000])
def test_the_largest_batch_is_found_to_an_eighth(limit):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= limit

    found = largest(fits, 64)
    assert found <= limit and (found == 2**14 or limit - found <= max(1, found // 8))
    assert len(asked) == len(set(asked)) <= 10
    assert found in asked or found == 0


def row(op="topk_pack", what="keep 0.1 int8", shape="12608x3072", ratio=12.0, **more):
    return {
        "op": op,
        "what": what,
        "shape": shape,
        "baseline": "as released: kthvalue, mask, x[mask], bitmap",
        "served_by": "native-cuda",
        "share_of_copy": 0.4,
        "ratio": ratio,
        **more,
    }


def test_goals_are_compared_with_what_was_measured():
    step = {"model": "vit_base_patch16_224", "mode": "stock", "peak_bytes": 1000, "seconds": 2.0}
    ours = step | {"mode": "Back Razor 0.1", "peak_bytes": 240, "seconds": 2.5}
    record = {"rows": [row()], "training": [step, ours]}
    compared = {r["what"]: r for r in goals.compare(record)}
    assert len(compared) == len(goals.GOALS)
    found = [(r["measured"], r["met"]) for r in compared.values()]
    assert found == [
        (0.4, False),
        (12.0, True),
        (None, None),
        (None, None),
        (0.24, True),
        (1.25, False),
        (None, None),
    ]
    text = goals.format_goals(list(compared.values()))
    assert text.count("MISSED") == 2 and text.count("not measured") == 3
    assert "at most 0.25         0.24 met" in text


def test_every_goal_finds_its_row():
    """Cases and modes have not been renamed under them."""
    cases = {(c.op, c.what, c.shape): c for c in all_cases(64, "meta", torch.bfloat16)}
    rows = []
    for op, what, shape in cases:
        baselines = ("as released: kthvalue", "scaled_dot", "cat of magnitudes")
        rows += [row(op, what, shape, baseline=baseline) for baseline in baselines]
    training = [
        dict(model=workload.title, mode=mode.name, peak_bytes=1, seconds=1.0, graph_seconds=1.0)
        for workload, modes in GPU_PAIRS
        for mode in modes
    ]
    compared = goals.compare({"rows": rows, "training": training})
    assert not [r["what"] for r in compared if r["measured"] is None]


def test_owners_that_are_slower_are_named():
    rows = [row(baseline="triton", ratio=0.8), row(baseline="triton", ratio=1.2), row(ratio=0.5)]
    (line,) = gpu.slower_owners(rows)
    assert line == "topk_pack keep 0.1 int8: native-cuda takes 1.25x the time of triton"


def test_no_time_left_is_said():
    record = {
        "left_out": [],
        "rows": [],
        "training": [],
        "copy_gb_per_s": 1,
        "product_tflop_per_s": 1,
    }
    gpu.measure_kernels(record, gpu.QUICK, "cpu", harness.cpu_timer, gpu.Budget(0))
    gpu.measure_training(record, gpu.QUICK, "cpu", harness.cpu_timer, gpu.Budget(0), 2**30)
    assert not record["rows"] and not record["training"]
    cases = all_cases(gpu.QUICK.batch, "cpu", torch.bfloat16)
    assert len(record["left_out"]) == len(cases) + len(gpu.QUICK.pairs)


def test_floors(capsys):
    rows = gpu.floors(1)
    packed = next(r for r in rows if (r["op"], r["what"]) == ("topk_pack", "keep 0.1 int8"))
    # A row of 768 in bfloat16, 78 entries of two bytes, 3 scales.
    assert packed["moved_bytes"] == 197 * (2 * 768 + 2 * 78 + 2 * 3)
    product = next(r for r in rows if r["op"] == "topk_weight_grad")
    assert product["flops"] == 2 * 197 * 768 * 3072
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


@pytest.mark.slow
def test_the_program_on_a_cpu(tmp_path):
    pytest.importorskip("timm")
    output = tmp_path / "gpu.json"
    done = run("--device=cpu", "--quick", f"--output={output}")
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert {r["op"] for r in record["rows"]} == set(_ops.NAMES)
    assert not record["left_out"]
    assert [r["met"] for r in record["goals"]] == [None] * len(goals.GOALS)
    saved = {(r["model"], r["mode"]): r["saved_bytes_per_sample"] for r in record["training"]}
    for (model, mode), count in saved.items():
        if mode != "stock":
            fewer = 8 if "Razor" in mode or "bits" in mode else 1
            assert count < saved[model, "stock"] / fewer, (model, mode)
