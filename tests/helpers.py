"""What several test files share: comparisons, error bounds and one table of formats."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memtl import reference
from memtl.reference.fused import ACTIVATIONS
from memtl.reference.quant import dither, in_groups
from memtl.storage import CenteredTopK, Dense, Format, Packed, Quantized, SignMean, TopK

ROOT = Path(__file__).parent.parent

FORMATS: dict[str, Format] = {
    "dense": Dense(),
    "dense-bf16": Dense("bf16"),
    "topk-index": TopK(0.1),
    "topk-bitmap": TopK(0.25),
    "topk-fp32": TopK(0.1, values="fp32"),
    "topk-sample": TopK(0.1, scope="sample", values="fp16"),
    "centered": CenteredTopK(0.1),
    "sign": SignMean(),
    "8-bit": Quantized(8),
    "4-bit": Quantized(4),
    "3-bit": Quantized(3),
    "2-bit": Quantized(2),
}
LOSSY = {name: format for name, format in FORMATS.items() if name != "dense"}


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal in dtype, shape and every bit of every value (NaN equals NaN)."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """|actual - expected| <= bound everywhere, computed in float64."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    error = (actual.double() - expected.double()).abs()
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(error.shape)
    if error.numel():
        worst = (error - bound).max().item()
        assert (error <= bound).all(), f"{worst:.3g} beyond the bound, error {error.max():.3g}"


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def gamma(operations: int, dtype: torch.dtype = torch.float32) -> float:
    """Higham's bound on the relative error of a sum of products of that many terms, any order."""
    u = unit(dtype)
    return operations * u / (1 - operations * u)


def exact_activation(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """f and f' in float64; at what float64 cannot tell from infinity, the limits."""
    f, derivative = ACTIVATIONS[name]
    x = x.double()
    if name == "gelu":  # torch's cancels where x is far below zero
        return x * torch.special.ndtr(x), derivative(x.clamp(-40, 40))
    return f(x.clamp_min(-800)), derivative(x.clamp(-800, 800))


def assert_derivative_codes(
    codes: Tensor, x: Tensor, bits: int, name: str, lo: float, hi: float, seed: int, off: float
) -> None:
    """What quant_pack_derivative is to give: by the dither of x the level below f'(x), which may be
    ``off``; so a code is another one only where a boundary is as near. NaN's code where x is not
    finite, of hardswish at NaN alone."""
    groups, top = in_groups(x), 2**bits - 2
    assert codes.shape == (len(groups), 8 * bits) and codes.dtype == torch.uint8
    size, step = list(groups.shape), (hi - lo) / top
    levels = reference.quant_unpack_range(codes, bits, 0.0, top, size, torch.float32)
    wanted = groups.isnan() if name == "hardswish" else ~groups.isfinite()
    assert torch.equal(levels.isnan(), wanted)
    _, slope = exact_activation(name, groups)
    place = (slope.clamp(lo, hi) - lo) / step + dither(groups, seed)
    room = off / step + 4 * unit(torch.float32) * 2**bits  # and the arithmetic in float32
    number = ~levels.isnan()
    low, high = (place - 1 - room)[number], (place + room)[number]
    found = levels[number].double()
    assert ((found <= high) & ((found > low) | (found == top))).all()


def summed(packed: Packed) -> Tensor:
    """|x| by element as a product adds it up: of a mean and a deviation, each by itself."""
    size = packed.unpack(torch.float32).abs().double()
    if isinstance(packed.format, CenteredTopK):  # |x - mean| + |mean| is no more than this
        size += 2 * packed.tensors[-1].abs()
    return size


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-300)).item()


def leaves(tensors: Sequence[Tensor | None], needs: Sequence[bool] | None = None):
    """Fresh leaves with the same values; those in floating point need gradients, or those named."""
    result = []
    for i, t in enumerate(tensors):
        if t is None:
            result.append(None)
            continue
        need = t.is_floating_point() if needs is None else needs[i]
        result.append(t.detach().clone(memory_format=torch.preserve_format).requires_grad_(need))
    return result


def run(fn: Callable, tensors: Sequence[Tensor | None], needs=None, seed: int = 0):
    """Forward and backward of ``fn(*tensors)`` from a fixed random state and a fixed grad_out.

    Returns the output, the gradients (None where none arrived) and the generator's state after the
    forward.
    """
    inputs = leaves(tensors, needs)
    torch.manual_seed(seed)
    out = fn(*inputs)
    state = torch.get_rng_state()
    out.backward(grad_like(out))
    grads = [None if t is None else t.grad for t in inputs]
    return out.detach(), grads, state


def grad_like(out: Tensor, seed: int = 1) -> Tensor:
    """A fixed random gradient for ``out``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def python(code: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter at the repository's root."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def kept_count(n: int, keep: float) -> int:
    """Entries that TopK's block scope keeps in a row of n, written out independently."""
    full, tail = divmod(n, 256)
    nearest = lambda length: max(1, math.floor(length * keep + 0.5)) if length else 0  # noqa: E731
    return full * nearest(256) + nearest(tail)


def write_vtab(folder: Path, classes: int = 3) -> None:
    """A dataset of 8, 4 and 6 images in VTAB-1k's layout: PNG and JPEG, blanks in their names, of
    a brightness that tells their class."""
    from PIL import Image

    lists: dict[str, list[str]] = {}
    for name, count in (("train800", 8), ("val200", 4), ("test", 6)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(count):
            label, kind = i % classes, ("png", "jpg")[i // classes % 2]
            path = f"images/{name}/image {i}.{kind}"
            noise = torch.randint(40, (12, 20, 3))
            pixels = (noise + 200 * label // classes).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / path)
            lists.setdefault(name, []).append(f"{path} {label}")
    lists["train800val200"] = lists["val200"] + lists["train800"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
