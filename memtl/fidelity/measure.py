"""measure(): every configuration, every format in every role, every depth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..methods import BackRazorConfig, Config, LowBitConfig, apply, unconvert
from ..nn import ROLES, convert
from ..nn.swap import is_swapped
from ..storage import Format
from ..training import track
from .compare import agreement, cosine, sort
from .names import DEFAULT, code, named
from .recommend import Choice, choose
from .result import Result
from .rows import Row, Thresholds
from .runner import Runner, Step

PRESETS, KEEPS, BITS = ("fast", "small", "paper"), (0.1, 0.03), (8, 4, 3, 2)


@dataclasses.dataclass(frozen=True)
class _Way:
    """A conversion to measure."""

    label: str
    code: str
    convert: Callable[[nn.Module], Any]
    role: str = ""


def configurations() -> dict[str, Config]:
    """What is measured with everything converted, unless told otherwise."""
    low: dict[str, Config] = {f"low-bit {bits}": LowBitConfig(bits=bits) for bits in BITS}
    return low | {
        f"{preset} {keep:g}": BackRazorConfig.preset(preset, keep=keep)
        for preset in PRESETS
        for keep in KEEPS
    }


def measure(
    model: nn.Module,
    step: Step,
    *,
    formats: Mapping[str, Format] | Sequence[str | Format] = DEFAULT,
    configurations: Mapping[str, Config] | None = None,
    batch_size: int = 1,
    seed: int = 0,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
    progress: bool | None = None,
) -> Result:
    """Compare the gradients computed from what is kept with the exact ones.

    Every run starts from the same random numbers and buffers; rounding is a pure function of the
    data. ``model`` is left as it was found, after an error too: not converted, its buffers,
    gradients and mode untouched.

    Args:
        model: any module, not converted, as it is to be trained (training mode or not).
        step: ``step(model)`` runs the forward on the batch in question and returns the loss, a
            scalar.
        formats: what is tried in every role by itself: short names (``"q4"``, ``"topk10"``), or
            formats, or formats by what to call them.
        configurations: what is tried with everything converted, by what to call it; None for
            ``LowBitConfig`` at 8, 4, 3, 2 bits and each preset of ``BackRazorConfig`` at keep 0.1
            and 0.03. The best formats of all roles together are tried besides.
        batch_size: samples of the batch, for bytes a sample.
        seed: of torch's generators, set before every run.
        thresholds: what a recommendation must meet.
        progress: as in :func:`memtl.training.track`.

    Returns:
        A result; ``print`` it for the tables, ``to_dict()`` is ready for JSON.

    Raises:
        TypeError: an argument is of the wrong type; ``step`` returns no tensor.
        ValueError: no parameter trains, or one that does is not float32 or float64; the loss is no
            finite scalar, or depends on no parameter; every gradient is zero; a format's name is
            unknown; the model is converted already.
    """
    formats = named(formats)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    runner = Runner(model, step, seed)
    if any(is_swapped(module) for module in model.modules()):
        raise ValueError("this model is already converted: memtl.unconvert(model) first")
    bench = _Bench(runner, batch_size)
    whole = _globals(configurations)
    roles = bench.roles(next(iter(formats.values())))
    single = [
        _Way(name, code(format), _one_role(role, format), role)
        for role in roles
        for name, format in formats.items()
    ]
    rows = [bench(way) for way in track([*whole, *single], "measuring", progress=progress)]
    by_role = tuple(rows[len(whole) :])
    choices = [choose([r for r in by_role if r.role == role], thresholds, role) for role in roles]
    together = [bench(way) for way in _together(choices, formats)]
    by_configuration = (*rows[: len(whole)], *together)
    if by_configuration:
        choices.append(choose(by_configuration, thresholds))
    return Result(
        stock_bytes=bench.stock_bytes,
        batch_size=batch_size,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        negligible=bench.exact.negligible,
        absent=tuple(role for role in ROLES if role not in roles),
        thresholds=thresholds,
        configurations=by_configuration,
        roles=by_role,
        choices=tuple(choices),
    )


class _Bench:
    """The stock model, measured; calling it measures a conversion of the same model."""

    def __init__(self, runner: Runner, batch_size: int):
        self._runner = runner
        self._batch_size = batch_size
        self._reaching: dict[str, Tensor] = {}
        gradients, layers = runner.gradients(self._reaching.__setitem__)
        self.exact = sort(gradients)
        self._layers = [name for name in layers if name in self._reaching]
        self.stock_bytes = runner.kept().bytes / batch_size

    def roles(self, format: Format) -> list[str]:
        """Those of which the model has a layer that keeps something."""
        model = self._runner.model
        found: set[str] = set()
        try:
            for row in convert(model, dict.fromkeys(ROLES, format)).converted:
                found.update(row.role.split("/") if row.kept != "nothing" else ())
        except ValueError:  # nothing to convert
            return []
        unconvert(model)
        return [role for role in ROLES if role in found]

    def __call__(self, way: _Way) -> Row:
        row = Row(way.label, way.code, way.role)
        try:
            way.convert(self._runner.model)
            return self._measured(row)
        except Exception as error:  # whatever it is, it is what was found; the others go on
            reason = str(error).strip().partition("\n")[0][:300]
            return dataclasses.replace(row, error=f"{type(error).__name__}: {reason}")
        finally:
            if any(is_swapped(module) for module in self._runner.model.modules()):
                unconvert(self._runner.model)

    def _measured(self, row: Row) -> Row:
        cosines: dict[str, float] = {}

        def seen(name: str, gradient: Tensor) -> None:
            if name in self._reaching:
                cosines[name] = cosine(gradient, self._reaching[name])

        found, _ = self._runner.gradients(seen)
        kept = self._runner.kept()
        depths = {name: cosines.get(name, math.nan) for name in reversed(self._layers)}
        return dataclasses.replace(
            row,
            bytes=kept.bytes / self._batch_size,
            bits=kept.bits,
            weights=agreement(found, self.exact.weights),
            vectors=agreement(found, self.exact.vectors),
            input_cosine=depths[self._layers[0]] if self._layers else math.nan,
            depths=depths,
        )


def _globals(given: Mapping[str, Config] | None) -> list[_Way]:
    chosen = configurations() if given is None else given
    return [_Way(label, _shortest(config), _all(config)) for label, config in chosen.items()]


def _shortest(config: Config) -> str:
    """A preset by its name, anything else field by field."""
    for preset in PRESETS:
        for keep in KEEPS:
            if config == BackRazorConfig.preset(preset, keep=keep):
                return f'memtl.BackRazorConfig.preset("{preset}", keep={keep:g})'
    return code(config)


def _all(config: Config) -> Callable[[nn.Module], Any]:
    return lambda model: apply(model, config)


def _one_role(role: str, format: Format) -> Callable[[nn.Module], Any]:
    return lambda model: convert(model, {role: format})


def _together(choices: Sequence[Choice], formats: Mapping[str, Format]) -> list[_Way]:
    """The best formats of all roles in one configuration: as they are, and each state once."""
    best = {c.role: formats[c.row.label] if c.row else None for c in choices}
    if not any(best.values()):
        return []
    once = {role: f and dataclasses.replace(f, rebuild=True) for role, f in best.items()}
    configs = {
        "best of each role": BackRazorConfig(**best),  # type: ignore[arg-type]
        "best of each, once": BackRazorConfig(**once),  # type: ignore[arg-type]
    }
    return [_Way(label, code(config), _all(config)) for label, config in configs.items()]
