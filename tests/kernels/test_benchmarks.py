"""The benchmarks: that a baseline does what it stands for, and that the programs run and refuse."""

import inspect
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import memtl
from benchmarks.kernels import cases, harness, overhead, table
from memtl import _ops, reference
from memtl.storage import TopK

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------------------------------- baselines


def test_released_packing_keeps_what_the_paper_keeps():
    x = torch.randn(4 * 50, 64)
    values, bits = cases.released_pack(x, 4, 0.1)
    ours = TopK(0.1, scope="sample", values="fp32")
    packed, shape = ours.pack(x.view(4, 50, 64)), torch.Size((4, 50, 64))
    dense = cases.released_unpack(values, bits, x.shape)
    assert torch.equal(dense.view(shape), ours.unpack(packed, shape, torch.float32))


def test_packed_bits_are_the_operators():
    mask = torch.rand(10, 16) < 0.5
    bits = cases.packbits(mask)
    assert torch.equal(bits, reference.bits_pack(mask))
    assert torch.equal(cases.unpackbits(bits), mask.flatten())


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("limits", [(), (-4.0, 4.0)], ids=["own range", "fixed range"])
def test_plain_quantisation_is_off_by_less_than_a_step(bits, limits):
    x = torch.randn(10, 64).clamp(-4, 4)
    packed, scale, low = cases.plain_quant_pack(x, bits, *limits)
    assert packed.shape == (10, 8 * bits) and packed.dtype == torch.uint8
    back = cases.plain_quant_unpack(packed, scale, low, bits, x.shape, x.dtype)
    assert ((back - x).abs() <= scale * (1 + 1e-5)).all()


# Baselines that compute what the operator computes, and not only something as useful.
EQUAL = {
    "topk_weight_grad": "topk_unpack, then the dense product",
    "topk_conv_weight_grad": "a few samples unpacked at a time, then torch's own",
    "quant_unpack_activation": "quant_unpack, gelu",
    "quant_activation_grad": "quant_unpack, gelu_backward",
    "quant_pack_normalized": "(x - mean).mul_(rstd), quant_pack",
    "quant_norm_grad": "quant_unpack, native_layer_norm_backward",
    "quant_channel_norm_grad": "quant_unpack, native_batch_norm_backward",
    "quant_apply_range": "quant_unpack_range, mul_",
    "bits_pack": "numpy.packbits",
    "bits_pack_between": "bits_pack(~(x <= 0))",
    "bits_apply": "torch.where(mask, x * scale, 0)",
    "bits_select": "x[mask], a byte an element",
    "bits_expand": "zeros, dense[mask] = values",
    "threshold_magnitude": "cat of magnitudes, kthvalue",
    "threshold_mask": "packbits(x.abs() >= value)",
    "masked_linear": "bits_apply, F.linear",
    "masked_linear_input_grad": "bits_apply, grad_out @",
    "masked_linear_weight_grad": "grad_out.t() @ x, bits_apply",
    "attention_grad": "backward alone, from all that autograd keeps",
    "query_attention_grad": "backward alone, from all that autograd keeps",
}


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_cases(family):
    for case in cases.FAMILIES[family](1, "cpu", torch.float32):
        calls = case.make()
        ours = calls.pop("memtl")
        assert ours.func is getattr(torch.ops.memtl, case.op)
        assert calls and all(baseline() is not None for baseline in calls.values())
        assert cases.moved_bytes(ours) >= 0.25 * case.elements
        if case.op in EQUAL:
            result, expected = ours(), calls[EQUAL[case.op]]()
            if isinstance(result, tuple):
                result = result[:3] if isinstance(expected, tuple) else result[0]
            # Sums of 197 terms near 1 in float32: 197 * 2**-24 * 197 is 2e-3, far below any slip.
            torch.testing.assert_close(result, expected, rtol=0, atol=2e-3)


def test_every_operator_has_a_case():
    names = {case.op for case in cases.all_cases(1, "cpu", torch.float32)}
    assert names == set(_ops.NAMES)


# ------------------------------------------------------------------------------------------- timing


def test_medians_are_of_turns():
    log = []

    def call(name, seconds):
        log.append(name)
        return seconds

    calls = {
        "a": [partial(call, "a0", 1.0), partial(call, "a1", 3.0)],
        "b": [partial(call, "b", 2.0)],
    }
    medians = harness.interleaved_medians(calls, lambda call: call(), seconds=0.0)
    assert medians == {"a": 1.0, "b": 2.0}  # of 1, 3, 1, 3, 1
    assert log == ["a0", "a1", "b", *["a0", "b", "a1", "b"] * 2, "a0", "b"]


def test_commit_and_environment(tmp_path, monkeypatch):
    facts = harness.environment("cpu", 7)
    assert facts["seed"] == 7 and facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert str(ROOT) not in json.dumps(facts["command"])
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness.commit() == "unknown"


# ----------------------------------------------------------------------------------------- programs


def test_table(tmp_path):
    output = tmp_path / "cpu.json"
    done = run("kernels/table.py", "--quick", "--unchecked", "--only=bits", f"--output={output}")
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["unchecked"] is True
    assert record["command"].startswith("python benchmarks/kernels/table.py")
    bits = {name for name in _ops.NAMES if name.startswith("bits_")}
    assert {row["op"] for row in record["rows"]} == bits
    for row in record["rows"]:
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert row["baseline"] in done.stdout
    measured = [row["isa"] for row in record["rows"]]
    native = memtl.backends.owner("bits_pack", "cpu") == "native-cpu"
    assert set(measured) == (set(memtl._C.isas()) if native else {"none"})


def test_table_of_one_instruction_set(tmp_path):
    output = tmp_path / "cpu.json"
    done = run("kernels/table.py", "--quick", "--unchecked", "--isa=sse", f"--output={output}")
    assert done.returncode != 0 and "sse" in done.stderr and not output.exists()


def test_overhead():
    rows = overhead.measure(harness.cpu_timer, 0.0)
    assert [row["layer"] for row in rows] == list(overhead.LAYERS)
    for row in rows:
        assert row["overhead_us"] == pytest.approx(row["memtl_us"] - row["stock_us"])
        assert f"{row['memtl_us']:.1f}" in overhead.format_rows(rows)


def test_overhead_is_of_converted_layers():
    for name in overhead.LAYERS:
        step = overhead.make_step(name, True)
        layer = inspect.getclosurevars(step).nonlocals["layer"]
        assert memtl.unconvert(layer) >= 1


def test_a_result_is_named_after_the_processor(monkeypatch):
    def named(name):
        monkeypatch.setattr(harness, "cpu_name", lambda: name)
        return harness.result_path("kernels").name

    assert named("Intel(R) Xeon(R) Processor") == "kernels-intel-xeon.json"
    assert (
        named("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz") == "kernels-intel-core-i7-9750h-cpu.json"
    )


def test_table_refuses_where_a_test_fails(tmp_path, monkeypatch, capsys):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it():\n    assert False\n")
    output = tmp_path / "cpu.json"
    monkeypatch.setattr(table, "TESTS", str(failing))
    monkeypatch.setattr(sys, "argv", ["table.py", "--quick", f"--output={output}"])
    assert table.main() == 1
    assert "nothing is measured" in capsys.readouterr().err
    assert not output.exists()
