"""What a storage format is, and the packed tensor it makes."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .convolution import ConvGeometry, library_weight_grad
from .outline import outlined

_KINDS: dict[str, type[Format]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(abc.ABC):
    """How a tensor is kept between forward and backward.

    A format is a frozen dataclass without tensors: it can be compared, hashed, written to JSON and
    handed to a ``torch.autograd.Function``. To add one, subclass it with a ``kind`` and the three
    abstract methods; it can then be named in every configuration.

    Args:
        rebuild: keep nothing where the tensor can be rebuilt from what other layers keep in at
            least as many bits (of each part, which bounds the error of the parts, not of what is
            made of them); and let the layer's output be rebuilt from what it keeps. (A tensor that
            several layers keep in the same format is kept once in any case.)
    """

    kind: ClassVar[str] = ""
    rebuild: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):  # its own: what derives from a format does not replace it
            _KINDS[cls.kind] = cls

    @abc.abstractmethod
    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """The tensors kept in place of ``x`` (any shape, floating point)."""

    @abc.abstractmethod
    def unpack(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The stored approximation of x, dense, of the given shape and dtype."""

    @abc.abstractmethod
    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Bytes that :meth:`pack` keeps for a tensor of this shape and dtype, exactly."""

    def weight_grad(
        self, packed: tuple[Tensor, ...], shape: torch.Size, grad_out: Tensor
    ) -> Tensor:
        """``grad_out^T x`` [O, D] for x [..., D] and grad_out [T, O]; at least float32."""
        compute = torch.promote_types(grad_out.dtype, torch.float32)
        x = self.unpack(packed, shape, grad_out.dtype)
        return (grad_out.t() @ x.reshape(-1, shape[-1])).to(compute)

    def conv_weight_grad(
        self,
        packed: tuple[Tensor, ...],
        shape: torch.Size,
        grad_out: Tensor,
        input_size: Sequence[int],
        weight_size: Sequence[int],
        geometry: ConvGeometry,
        channels_last: bool,
    ) -> Tensor:
        """The weight gradient of a convolution, of ``weight_size``, at least float32.

        x was packed as ``shape`` [B, n], a row being a sample of ``input_size`` (C, ...) or, with
        ``channels_last``, in the order (..., C).
        """
        x = self.unpack(packed, shape, grad_out.dtype)
        return library_weight_grad(x, grad_out, input_size, weight_size, geometry, channels_last)

    @property
    def precision(self) -> int:
        """Bits by which a value is told from its neighbours; 0 where values are dropped or
        clamped, from which nothing is rebuilt."""
        return 0

    @property
    def exact(self) -> bool:
        """Whether what is unpacked is what was packed, bit for bit."""
        return False

    @property
    def any_order(self) -> bool:
        """Whether one order of the elements is as good as another: dimensions have no say, and a
        tensor that is permuted in memory may be packed as it lies there."""
        return False

    @property
    def _once(self) -> str:
        """For the end of ``str``."""
        return " once" if self.rebuild else ""

    def finer(self) -> Format:
        """A more faithful format, for a tensor that is small beside its neighbours; itself where
        there is none."""
        return self

    def resolve(self, keep: float) -> Format:
        """This format with a fraction to keep filled in where it leaves that open."""
        return self

    @abc.abstractmethod
    def __str__(self) -> str:
        """A few characters for a table: ``topk 10% int8``."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :func:`format_from_dict` reads it back."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


def format_from_dict(data: dict[str, Any]) -> Format:
    """The format that :meth:`Format.to_dict` described.

    Raises:
        ValueError: ``kind`` is missing or unknown, or a field is not one of that kind.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"format kind must be one of {sorted(_KINDS)}, got {kind!r}")
    cls = _KINDS[kind]
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"format {kind!r} has no field {unknown}; it has {sorted(known)}")
    return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed tensor: what was kept, and what is needed to read it.

    ``tensors`` go to ``save_for_backward``; :meth:`spec` is the rest, safe to keep on ``ctx``.
    """

    format: Format
    tensors: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense approximation, in the original dtype unless told otherwise."""
        return self.format.unpack(self.tensors, self.shape, dtype or self.dtype)

    def to(self, dtype: torch.dtype) -> Packed:
        """The same, for a tensor of another dtype."""
        return Packed(self.format, self.tensors, self.shape, dtype)

    def weight_grad(self, grad_out: Tensor) -> Tensor:
        """``grad_out^T x`` [O, D]; grad_out [..., O] has as many rows as x [..., D]."""
        return self.format.weight_grad(
            self.tensors, self.shape, grad_out.reshape(-1, grad_out.shape[-1])
        )

    def masked_weight_grad(self, grad_out: Tensor, mask: Tensor) -> Tensor:
        """:meth:`weight_grad` where a bit of ``mask`` [ceil(O D / 8)] is set, 0 elsewhere; computed
        there alone where the format reads x dense."""
        if type(self.format).weight_grad is not Format.weight_grad:
            return torch.ops.memtl.bits_apply(self.weight_grad(grad_out), mask, 1.0)
        x = self.unpack(grad_out.dtype).reshape(-1, self.shape[-1])
        grad_out = grad_out.reshape(-1, grad_out.shape[-1])
        return torch.ops.memtl.masked_linear_weight_grad(grad_out, x, mask)

    def conv_weight_grad(
        self,
        grad_out: Tensor,
        input_size: Sequence[int],
        weight_size: Sequence[int],
        geometry: ConvGeometry,
        channels_last: bool,
    ) -> Tensor:
        """See :meth:`Format.conv_weight_grad`."""
        return self.format.conv_weight_grad(
            self.tensors, self.shape, grad_out, input_size, weight_size, geometry, channels_last
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the kept tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


def pack(x: Tensor, format: Format) -> Packed:
    """``x`` in ``format``.

    Raises:
        TypeError: x is split over processes, and the format is not exact.
    """
    if not format.exact and hasattr(x, "placements"):
        raise TypeError(
            f"a DTensor {list(x.shape)} cannot be kept in {format}: leave layers that run in "
            "tensor parallel out (exclude_modules), or keep them in Dense()"
        )
    (given,) = outlined(x)
    return Packed(format, format.pack(given), x.shape, x.dtype)


def check_rebuild(rebuild: bool) -> None:
    """Raise unless ``rebuild`` is True or False."""
    if not isinstance(rebuild, bool):
        raise TypeError(f"rebuild must be True or False, got {rebuild!r}")


def check_fraction(name: str, value: float | None) -> None:
    """Raise unless ``value`` is None or a number in (0, 1]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], got {type(value).__name__}")
    if not 0 < value <= 1 or math.isnan(value):
        raise ValueError(f"{name} must be in (0, 1], got {value}")
