"""What is checked on one model: conversion leaves the forward alone, saves memory, gives usable
gradients, and can be undone."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import memtl
from memtl.fidelity.compare import cosine
from memtl.nn import Report

SEED = 0
NEGLIGIBLE = 2**-19  # of the largest gradient's norm, 2e-6: rounding noise has no direction
LEAST_RATIO = 4.0
LEAST_COSINE = {0.1: 0.5, 1.0: 0.95}
KEEP, KEEP_ALL = LEAST_COSINE
MOST_SLOPE = 0.1  # how far the mean slope may be from 1 at keep 1

Convert = Callable[[nn.Module, float], Report]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How gradients compare with the exact ones, a parameter at a time.

    The slope of a gradient is its component along the exact one, in units of the exact one: a
    cosine does not see a factor.
    """

    mean_cosine: float = math.nan
    worst_cosine: float = math.nan
    worst: str = ""
    mean_slope: float = math.nan
    farthest_slope: float = math.nan  # from 1
    farthest: str = ""
    compared: int = 0
    negligible: int = 0


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradients of a converted model against the exact ones."""

    weights: Agreement  # parameters along more than one axis
    vectors: Agreement  # biases, norms, scalars
    missing: tuple[str, ...]  # absent where stock has one, or the other way round
    not_finite: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Remaining:
    """Layers that still keep bytes after conversion; those that differ in their number share one.

    ``status`` is the role under which the layer is converted, or why it is not.
    """

    layer: str
    kind: str
    status: str
    bytes: int


@dataclasses.dataclass
class Check:
    """What was found on one model. What was not reached, because of ``error``, is None."""

    stage: str = "stock"  # the last that was begun
    error: str = ""
    parameters: int | None = None
    stock_bytes: int | None = None
    kept_bytes: int | None = None
    repeats: bool | None = None  # whether the stock model gives the same gradients twice
    same_forward: bool | None = None
    same_buffers: bool | None = None
    same_keys: bool | None = None
    pruned: Gradients | None = None  # at keep 0.1
    unpruned: Gradients | None = None  # at keep 1
    remaining: tuple[Remaining, ...] = ()
    classes_back: bool | None = None
    forward_back: bool | None = None
    gradients_back: bool | None = None

    @property
    def ratio(self) -> float:
        """Bytes saved for backward, stock over converted."""
        if not self.stock_bytes or self.kept_bytes is None:
            return math.nan
        return self.stock_bytes / self.kept_bytes if self.kept_bytes else math.inf

    def failures(self) -> list[str]:
        """Which of the criteria this model misses; empty when it passes."""
        if self.error:
            return [self.error]
        found = []
        if not self.same_forward:
            found.append("the forward differs")
        if not self.same_buffers:
            found.append("buffers differ after the forward")
        if not self.same_keys:
            found.append("the keys of the state_dict differ")
        if not self.ratio >= LEAST_RATIO:
            found.append(f"{self.ratio:.2f}x fewer bytes")
        for keep, gradients in ((KEEP, self.pruned), (KEEP_ALL, self.unpruned)):
            found += [f"keep {keep:g}: {text}" for text in _gradient_failures(gradients, keep)]
        if not self.classes_back:
            found.append("unconvert leaves classes or attributes behind")
        if not self.forward_back:
            found.append("the forward differs after unconvert")
        if not self.gradients_back:
            because = "" if self.repeats else " (as they do from run to run of the stock model)"
            found.append(f"gradients differ after unconvert{because}")
        return found

    def worst_meet(self) -> bool:
        """Whether even the worst weight meets the bound that is asked of the mean."""
        return all(
            gradients is not None and gradients.weights.worst_cosine > LEAST_COSINE[keep]
            for keep, gradients in ((KEEP, self.pruned), (KEEP_ALL, self.unpruned))
        )


def _gradient_failures(gradients: Gradients | None, keep: float) -> Iterator[str]:
    if gradients is None:
        yield "not reached"
        return
    for what, names in (
        ("missing", gradients.missing),
        ("not finite", gradients.not_finite),
    ):
        if names:
            yield f"{len(names)} gradients {what} ({names[0]})"
    if not gradients.weights.mean_cosine > LEAST_COSINE[keep]:
        yield f"mean cosine of the weights {gradients.weights.mean_cosine:.3f}"
    slope = gradients.weights.mean_slope
    if keep == KEEP_ALL and not abs(slope - 1) <= MOST_SLOPE:
        yield f"mean slope of the weights {slope:.2f}"


def back_razor(model: nn.Module, keep: float) -> Report:
    """The conversion that is checked."""
    return memtl.apply(model, memtl.BackRazorConfig(keep=keep))


def check(model: nn.Module, inputs: Mapping[str, Any], convert: Convert = back_razor) -> Check:
    """Check ``model``, as it is (training mode or not), on ``model(**inputs)``.

    An exception of the model's or of the conversion is a result: it becomes ``error``. The model
    is left converted in that case, and as it was otherwise.
    """
    result = Check(parameters=sum(p.numel() for p in model.parameters()))
    try:
        _fill(result, model, inputs, convert)
    except Exception as error:  # whatever it is, the other models are still to be checked
        reason = str(error).strip().partition("\n")[0][:300]
        result.error = f"{result.stage}: {type(error).__name__}: {reason}"
    return result


def _fill(result: Check, model: nn.Module, inputs: Mapping[str, Any], convert: Convert) -> None:
    keys = list(model.state_dict())
    run = _Runner(model, inputs)
    exact = run()
    classes = [(type(module), set(vars(module))) for module in model.modules()]
    if not all(t.isfinite().all() for t in (*exact.outputs, *exact.gradients.values())):
        raise ValueError("outputs or gradients are not finite")
    result.repeats = run().same_gradients(exact)
    result.stock_bytes = run.saved().bytes

    result.stage = f"convert at keep {KEEP:g}"
    report = convert(model, KEEP)
    result.same_keys = list(model.state_dict()) == keys
    result.stage = f"training step at keep {KEEP:g}"
    found = run()
    result.same_forward = found.same_outputs(exact)
    result.same_buffers = found.same_buffers(exact)
    result.pruned = _compare(exact.gradients, found.gradients)
    saved = run.saved()
    result.kept_bytes = saved.bytes
    result.remaining = _remaining(model, report, saved.by_layer)
    del found, saved
    memtl.unconvert(model)

    result.stage = f"convert at keep {KEEP_ALL:g}"
    convert(model, KEEP_ALL)
    result.stage = f"training step at keep {KEEP_ALL:g}"
    found = run()
    result.same_forward &= found.same_outputs(exact)
    result.same_buffers &= found.same_buffers(exact)
    result.unpruned = _compare(exact.gradients, found.gradients)
    del found

    result.stage = "unconvert"
    memtl.unconvert(model)
    result.classes_back = classes == [(type(m), set(vars(m))) for m in model.modules()]
    found = run()
    result.forward_back = found.same_outputs(exact) and found.same_buffers(exact)
    result.gradients_back = found.same_gradients(exact)
    run.restore()


@dataclasses.dataclass(frozen=True)
class _Run:
    """One forward and backward."""

    outputs: list[Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def same_outputs(self, other: "_Run") -> bool:
        return len(self.outputs) == len(other.outputs) and all(
            map(torch.equal, self.outputs, other.outputs)
        )

    def same_buffers(self, other: "_Run") -> bool:
        return _equal(self.buffers, other.buffers)

    def same_gradients(self, other: "_Run") -> bool:
        return _equal(self.gradients, other.gradients)


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class _Runner:
    """Runs the model again and again from one state: random numbers, buffers, no gradients."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]):
        self._model = model
        self._inputs = inputs
        self._buffers = {name: b.clone() for name, b in model.named_buffers()}

    def __call__(self) -> _Run:
        """Forward, and backward along a random direction of the outputs, always the same one.

        Not from a norm of the output: after a normalisation that is a constant.
        """
        outputs = self._forward()
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        generator = torch.Generator().manual_seed(SEED)
        directions = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        torch.autograd.backward(outputs, directions)
        named = self._model.named_parameters()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        self.restore()
        return _Run([t.detach() for t in outputs], buffers, gradients)

    def saved(self) -> memtl.memory.SavedTensors:
        """What one forward saves for backward."""
        with memtl.memory.SavedTensors(self._model) as saved:
            self._forward()
        self.restore()
        return saved

    def restore(self) -> None:
        """Buffers as they were, and no gradients."""
        present = dict(self._model.named_buffers())
        for name, buffer in self._buffers.items():
            present[name].copy_(buffer)
        self._model.zero_grad(set_to_none=True)

    def _forward(self) -> list[Tensor]:
        self.restore()
        torch.manual_seed(SEED)
        output = self._model(**self._inputs)
        values = output.values() if isinstance(output, Mapping) else [output]
        outputs = [t for t in values if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            raise ValueError(f"no output of {type(self._model).__name__} needs a gradient")
        return outputs


def _compare(exact: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Gradients:
    floor = NEGLIGIBLE * max(gradient.norm().item() for gradient in exact.values())
    # A scale a channel of shape [C, 1, 1, 1] is a vector, however many dimensions it is given.
    vectors = {name: g for name, g in exact.items() if g.numel() == max(g.shape, default=1)}
    weights = {name: g for name, g in exact.items() if name not in vectors}
    return Gradients(
        _agreement(weights, found, floor),
        _agreement(vectors, found, floor),
        missing=tuple(sorted(exact.keys() ^ found.keys())),
        not_finite=tuple(name for name, g in found.items() if not g.isfinite().all()),
    )


def _agreement(exact: Mapping[str, Tensor], found: Mapping[str, Tensor], floor: float) -> Agreement:
    cosines: dict[str, float] = {}
    slopes: dict[str, float] = {}
    for name, gradient in exact.items():
        if name not in found or gradient.norm() <= floor:
            continue
        a, b = gradient.double().flatten(), found[name].double().flatten()
        cosines[name] = cosine(a, b)
        slopes[name] = (a @ b / (a @ a)).item()
    negligible = sum(gradient.norm().item() <= floor for gradient in exact.values())
    if not cosines:
        return Agreement(negligible=negligible)
    worst = min(cosines, key=lambda name: (not math.isnan(cosines[name]), cosines[name]))
    farthest = max(slopes, key=lambda name: (math.isnan(slopes[name]), abs(slopes[name] - 1)))
    return Agreement(
        mean_cosine=sum(cosines.values()) / len(cosines),
        worst_cosine=cosines[worst],
        worst=worst,
        mean_slope=sum(slopes.values()) / len(slopes),
        farthest_slope=slopes[farthest],
        farthest=farthest,
        compared=len(cosines),
        negligible=negligible,
    )


def _remaining(
    model: nn.Module, report: Report, by_layer: Mapping[str, int]
) -> tuple[Remaining, ...]:
    """The layers that keep bytes, heaviest first."""
    modules = dict(model.named_modules())
    rows = {row.name: row for row in report.rows}
    totals: dict[tuple[str, str, str], int] = {}
    for name, count in by_layer.items():
        row = rows.get(name)
        kind = type(modules[name]).__name__ if name in modules else ""
        if row is None:
            status = "computes in its own code"
        else:
            status = row.reason or f"converted: {row.role}"
        key = (re.sub(r"\b\d+\b", "*", name) or "(the model itself)", kind, status)
        totals[key] = totals.get(key, 0) + count
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return tuple(Remaining(*key, count) for key, count in ranked)
