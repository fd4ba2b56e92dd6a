"""What a converted layer costs a call beyond its arithmetic: Python, dispatch, small tensors.

Each layer runs forward and backward on a tensor so small that its arithmetic is nothing, stock and
converted taking turns. What is printed is the difference, in microseconds, with one thread.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import memtl

from . import harness

SHAPE = (1, 8, 256)  # tokens of a transformer
IMAGE = (1, 256, 2, 2)
CALLS = 20  # timed together

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (partial(nn.Linear, 256, 256), SHAPE),
    "LayerNorm": (partial(nn.LayerNorm, 256), SHAPE),
    "GELU": (nn.GELU, SHAPE),
    "Dropout": (partial(nn.Dropout, 0.1), SHAPE),
    "MultiheadAttention": (partial(nn.MultiheadAttention, 256, 4, batch_first=True), SHAPE),
    "Conv2d": (partial(nn.Conv2d, 256, 256, 1), IMAGE),
    "BatchNorm2d": (partial(nn.BatchNorm2d, 256), IMAGE),
    "ReLU": (nn.ReLU, IMAGE),
}


def make_step(name: str, converted: bool) -> Callable[[], None]:
    """``CALLS`` times forward and backward of the named layer."""
    build, shape = LAYERS[name]
    layer = build().train()
    if converted:
        memtl.apply(layer, memtl.BackRazorConfig(keep=0.1))
    x = torch.randn(shape, requires_grad=True)
    inputs = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    grad_out = torch.randn(shape)

    def step() -> None:
        for _ in range(CALLS):
            y = layer(*inputs)
            (y[0] if isinstance(y, tuple) else y).backward(grad_out)

    return step


def measure(timer: harness.Timer, seconds: float) -> list[dict[str, Any]]:
    """A row a layer: microseconds of a call of each, forward and backward, and the difference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for name in LAYERS:
            calls = {mode: [make_step(name, mode == "memtl")] for mode in ("stock", "memtl")}
            medians = harness.interleaved_medians(calls, timer, seconds)
            stock, ours = (medians[mode] / CALLS * 1e6 for mode in ("stock", "memtl"))
            shape = "x".join(map(str, LAYERS[name][1]))
            rows.append(
                {
                    "layer": name,
                    "shape": shape,
                    "stock_us": stock,
                    "memtl_us": ours,
                    "overhead_us": ours - stock,
                }
            )
        return rows
    finally:
        torch.set_num_threads(threads)


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "a call, forward and backward, on a small tensor: microseconds, one thread",
        f"{'layer':18} {'input':>10} {'stock':>7} {'memtl':>7} {'more':>7}",
    ]
    lines += [
        f"{row['layer']:18} {row['shape']:>10} {row['stock_us']:7.1f} {row['memtl_us']:7.1f} "
        f"{row['overhead_us']:7.1f}"
        for row in rows
    ]
    return "\n".join(lines)
