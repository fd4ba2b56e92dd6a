"""Back Razor: the forward stays dense, what backward needs is kept compressed.

Jiang, Chen, Huang, Du, Wang: Back Razor: Memory-Efficient Transfer Learning by Self-Sparsified
Backpropagation, NeurIPS 2022.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..nn import ROLES
from ..storage import Dense, Format, Quantized, TopK
from ..storage.format import check_fraction
from .base.config import ConversionConfig


@dataclasses.dataclass(frozen=True)
class BackRazorConfig(ConversionConfig):
    """What each kind of layer keeps. The defaults are the preset ``fast``.

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

    method: ClassVar[str] = "back_razor"
    keep: float = 0.1
    linear: Format | None = TopK()
    convolution: Format | None = TopK()
    attention: Format | None = Quantized(bits=4)
    norm: Format | None = Quantized(bits=4)
    activation: Format | None = Quantized(bits=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None:
            raise TypeError("keep must be a number in (0, 1], got None")
        check_fraction("keep", self.keep)
        for role in ROLES:
            format = getattr(self, role)
            if format is not None and not isinstance(format, Format):
                raise TypeError(
                    f"{role} must be a memtl.storage.Format or None, got {type(format).__name__}"
                )

    @classmethod
    def preset(cls, name: str, **fields: Any) -> BackRazorConfig:
        """``fast`` (the defaults), ``small`` or ``paper``, with ``fields`` on top.

        ``fast`` prunes every input of a linear layer or convolution, because the weight gradient is
        computed from the kept fraction alone. ``small`` rebuilds such an input where a norm, an
        activation or attention keeps what it is made from, and prunes the others: fewer bytes and
        gradients closer to the exact ones, at the price of a dense product. ``paper`` prunes what
        the paper prunes, over each whole sample, with the paper's value types: inputs of linear
        layers and convolutions, attention's operands and probabilities in fp16, normalised inputs
        in fp32; activations keep their input in fp16, unpruned.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **fields})

    def formats(self) -> dict[str, Format | None]:
        """Role -> format, with ``keep`` filled in."""
        given = {role: getattr(self, role) for role in ROLES}
        return {role: f and f.resolve(self.keep) for role, f in given.items()}


_PAPER = TopK(scope="sample", values="fp16")
PRESETS: dict[str, dict[str, Format]] = {
    "fast": {},
    "small": {
        "linear": TopK(rebuild=True),
        "convolution": TopK(rebuild=True),
        "attention": Quantized(bits=4, rebuild=True),
        "norm": Quantized(bits=4, rebuild=True),
        "activation": Quantized(bits=4, rebuild=True),
    },
    "paper": {
        "linear": _PAPER,
        "convolution": TopK(scope="sample", values="fp32"),
        "attention": _PAPER,
        "norm": TopK(scope="sample", values="fp32"),
        "activation": Dense(dtype="fp16"),
    },
}
