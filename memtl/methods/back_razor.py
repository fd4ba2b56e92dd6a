"""Back Razor: the forward stays dense, what backward needs is kept compressed.

Jiang, Chen, Huang, Du, Wang: Back Razor: Memory-Efficient Transfer Learning by Self-Sparsified
Backpropagation, NeurIPS 2022.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import nn

from ..nn import Report, convert
from ..storage import Dense, Format, Quantized, TopK, format_from_dict
from ..storage.format import check_fraction

_ROLES = ("linear", "convolution", "attention", "norm", "activation")


@dataclasses.dataclass(frozen=True)
class BackRazorConfig:
    """What each kind of layer keeps. The defaults are the preset ``balanced``.

    A linear layer's input may be pruned hard: the error stays in that layer's own weight gradient.
    Errors in attention, in normalised inputs and in activation derivatives travel through the whole
    backward pass, so those get four bits instead.

    Args:
        keep: fraction in (0, 1] that every ``TopK`` without one of its own keeps.
        linear: linear inputs.
        convolution: convolution inputs.
        attention: q, k, v (under ``TopK`` the probabilities too), softmax results.
        norm: normalised inputs.
        activation: under ``Quantized`` the derivative in a fixed-range code, else the input.
        target_modules, exclude_modules: as in :func:`memtl.nn.convert`.

    A format of None leaves that role's layers alone.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: ``keep`` is outside (0, 1].
    """

    keep: float = 0.1
    linear: Format | None = TopK()
    convolution: Format | None = TopK()
    attention: Format | None = Quantized(bits=4)
    norm: Format | None = Quantized(bits=4)
    activation: Format | None = Quantized(bits=4)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.keep is None:
            raise TypeError("keep must be a number in (0, 1], got None")
        check_fraction("keep", self.keep)
        for role in _ROLES:
            format = getattr(self, role)
            if format is not None and not isinstance(format, Format):
                raise TypeError(
                    f"{role} must be a memtl.storage.Format or None, got {type(format).__name__}"
                )
        for option in ("target_modules", "exclude_modules"):
            value = getattr(self, option)
            if value is None or isinstance(value, str):
                continue
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                raise TypeError(f"{option} must be None, a string or strings, got {value!r}")
            object.__setattr__(self, option, tuple(value))

    @classmethod
    def preset(cls, name: str, **fields: Any) -> BackRazorConfig:
        """``balanced`` (the defaults) or ``paper``, with ``fields`` on top.

        ``paper`` prunes what the paper prunes, over each whole sample, with the paper's value
        types: inputs of linear layers and convolutions, attention's operands and probabilities in
        fp16, normalised inputs in fp32; activations keep their input in fp16, unpruned.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **fields})

    def formats(self) -> dict[str, Format | None]:
        """Role -> format, with ``keep`` filled in."""
        given = {role: getattr(self, role) for role in _ROLES}
        return {role: f and f.resolve(self.keep) for role, f in given.items()}

    def to_json(self) -> str:
        """The configuration as JSON; :meth:`from_json` reads it back to an equal one."""
        data: dict[str, Any] = {"method": "back_razor"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = value.to_dict() if isinstance(value, Format) else value
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> BackRazorConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, another method's configuration, or unknown fields.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("method", None) != "back_razor":
            raise ValueError('expected a JSON object with "method": "back_razor"')
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown fields {unknown}; a configuration has {sorted(known)}")
        for role in _ROLES:
            if isinstance(data.get(role), dict):
                data[role] = format_from_dict(data[role])
        return cls(**data)

    def apply(self, model: nn.Module) -> Report:
        """Convert ``model`` in place; which parameters train is left as it is."""
        return convert(
            model,
            self.formats(),
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
        )


_PAPER = TopK(scope="sample", values="fp16")
PRESETS: dict[str, dict[str, Format]] = {
    "balanced": {},
    "paper": {
        "linear": _PAPER,
        "convolution": TopK(scope="sample", values="fp32"),
        "attention": _PAPER,
        "norm": TopK(scope="sample", values="fp32"),
        "activation": Dense(dtype="fp16"),
    },
}
