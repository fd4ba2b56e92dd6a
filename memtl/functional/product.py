"""Products of activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..autograd.keep import is_parameter
from ..autograd.product import (
    BaddbmmFunction,
    EinsumFunction,
    MatmulFunction,
    MultiplyFunction,
    exact_matmul,
)
from ..storage import Dense, Format
from .common import (
    FOUR_BITS,
    autocast,
    broadcastable,
    check_format,
    check_tensors,
    needs,
    sizes,
)


def matmul(a: Tensor, b: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """``torch.matmul`` of two activations, both kept in ``format`` for the other one's gradient.

    Args:
        a: [..., N, K]; b: [..., K, M]. With a one-dimensional operand this is ``torch.matmul``.

    Raises:
        TypeError: an operand is no dense floating-point tensor.
        ValueError: shapes do not fit.

    Memory: ``format.nbytes`` of each operand whose partner needs a gradient; an operand that is a
    parameter, or a view of one, is there anyway and is kept by reference, exactly. One that is a
    quarter of its partner or of the result or less (the queries beside a map of attention) is kept
    in twice the bits: it costs little beside them. Under an exact format a reference to what
    torch.matmul keeps, which is a copy where it makes one, and gradients are its, bit for bit.
    """
    check_tensors("matmul", a=a, b=b)
    check_format("matmul", format)
    if a.dim() > 1 and b.dim() > 1:
        fits = a.shape[-1] == b.shape[-2] and broadcastable(a.shape[:-2], b.shape[:-2])
        if not fits:
            raise ValueError(
                f"matmul: expected a [..., N, K] and b [..., K, M], got {sizes(a)} and {sizes(b)}"
            )
    need_a, need_b = needs(a, b)
    if not (need_a or need_b) or a.dim() < 2 or b.dim() < 2:
        return torch.matmul(a, b)
    if format.exact:
        (a, _), (b, _) = autocast(a), autocast(b)
        return exact_matmul(a, b, format, need_a, need_b)
    result = a.numel() // max(1, a.shape[-1]) * b.shape[-1]
    format_a, format_b = _operand_formats(a, b, result, format)
    (a, _), (b, _) = autocast(a), autocast(b)
    return MatmulFunction.apply(a, b, format_a, format_b, need_a, need_b)


def _operand_formats(a: Tensor, b: Tensor, result: int, format: Format) -> list[Format]:
    """How the operands of a product of ``result`` elements are kept; see :func:`matmul`."""
    largest = max(a.numel(), b.numel(), result)

    def format_of(t: Tensor) -> Format:
        if is_parameter(t):
            return Dense()
        return format.finer() if 4 * t.numel() <= largest else format

    return [format_of(a), format_of(b)]


def baddbmm(
    input: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    format: Format = FOUR_BITS,
) -> Tensor:
    """``torch.baddbmm``, beta input + alpha a b; the gradient of ``input`` is exact.

    Args:
        input: broadcastable to [B, N, M].
        a: [B, N, K]; b: [B, K, M].

    Raises:
        TypeError, ValueError: as :func:`matmul`.

    Memory: as :func:`matmul`.
    """
    check_tensors("baddbmm", input=input, a=a, b=b)
    check_format("baddbmm", format)
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(
            f"baddbmm: expected a [B, N, K] and b [B, K, M], got {sizes(a)} and {sizes(b)}"
        )
    if not broadcastable(input.shape, (*a.shape[:2], b.shape[2])):
        raise ValueError(
            f"baddbmm: expected input that broadcasts to [B, N, M], got {sizes(input)} beside "
            f"{sizes(a)} and {sizes(b)}"
        )
    need_input, need_a, need_b = needs(input, a, b)
    if not (need_input or need_a or need_b):
        return torch.baddbmm(input, a, b, beta=beta, alpha=alpha)
    result = a.numel() // max(1, a.shape[2]) * b.shape[2]
    format_a, format_b = _operand_formats(a, b, result, format)
    (input, _), (a, _), (b, _) = autocast(input), autocast(a), autocast(b)
    return BaddbmmFunction.apply(input, a, b, beta, alpha, format_a, format_b, need_a, need_b)


def einsum(equation: str, a: Tensor, b: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """``torch.einsum`` of two activations, both kept in ``format`` for the other one's gradient.

    Args:
        equation: such as ``"bhid,bhjd->bhij"``: two operands, letters only, no letter twice in an
            operand, every letter of an operand also in the other one or in the result.

    Raises:
        TypeError: an operand is no dense floating-point tensor.
        ValueError: shapes do not fit.
        NotImplementedError: an equation of another kind; ``torch.einsum`` takes those.

    Memory: as :func:`matmul`.
    """
    check_tensors("einsum", a=a, b=b)
    check_format("einsum", format)
    indices = einsum_indices(equation)
    if indices is None:
        raise NotImplementedError(
            f"einsum: expected two operands of distinct letters, each letter in two of the three "
            f"terms, got {equation!r}"
        )
    of_a, of_b, of_out = indices
    if len(of_a) != a.dim() or len(of_b) != b.dim():
        raise ValueError(f"einsum: {equation!r} does not fit {sizes(a)} and {sizes(b)}")
    extent: dict[str, int] = {}
    for letter, size in (*zip(of_a, a.shape, strict=True), *zip(of_b, b.shape, strict=True)):
        if extent.setdefault(letter, size) != size:  # torch would broadcast a 1
            raise ValueError(
                f"einsum: {letter!r} of {equation!r} is {extent[letter]} and {size} in {sizes(a)} "
                f"and {sizes(b)}"
            )
    need_a, need_b = needs(a, b)
    if not (need_a or need_b):
        return torch.einsum(equation, a, b)
    result = math.prod([extent[letter] for letter in of_out])
    format_a, format_b = _operand_formats(a, b, result, format)
    (a, _), (b, _) = autocast(a), autocast(b)
    return EinsumFunction.apply(a, b, indices, format_a, format_b, need_a, need_b)


def einsum_indices(equation: str) -> tuple[str, str, str] | None:
    """The letters of two operands and of the result; None for equations that are not served."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    terms = operands.split(",")
    if not arrow or len(terms) != 2:
        return None
    a, b = terms
    for term, others in ((a, b + out), (b, a + out), (out, a + b)):
        if not term.isalpha() or len(set(term)) < len(term) or not set(term) <= set(others):
            return None
    return a, b, out


def mul(a: Tensor, b: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """``torch.mul`` of two activations, elementwise with broadcasting: gates, scales.

    The gradient of each operand is taken from the stored other one.

    Raises:
        TypeError: an operand is no dense floating-point tensor.
        ValueError: shapes do not broadcast.

    Memory: ``format.nbytes`` of each operand whose partner needs a gradient, before broadcasting.
    An operand that is a parameter, or a sixteenth of the result or less (a gate a channel), is kept
    by reference, exactly.
    """
    check_tensors("mul", a=a, b=b)
    return _multiply("mul", None, a, b, 1, format)


def addcmul(
    input: Tensor, a: Tensor, b: Tensor, *, value: float = 1, format: Format = FOUR_BITS
) -> Tensor:
    """``torch.addcmul``, input + value a b; the gradient of ``input`` is exact; see :func:`mul`."""
    check_tensors("addcmul", input=input, a=a, b=b)
    return _multiply("addcmul", input, a, b, value, format)


def _multiply(
    name: str, input: Tensor | None, a: Tensor, b: Tensor, value: float, format: Format
) -> Tensor:
    check_format(name, format)
    shapes = [t.shape for t in (input, a, b) if t is not None]
    if not all(broadcastable(s, t) for s in shapes for t in shapes):
        shown = " and ".join(str(list(s)) for s in shapes)
        raise ValueError(f"{name}: expected shapes that broadcast, got {shown}")
    need_input, need_a, need_b = needs(input, a, b)
    if not (need_input or need_a or need_b):
        return torch.mul(a, b) if input is None else torch.addcmul(input, a, b, value=value)
    numel = torch.broadcast_shapes(*shapes).numel()

    def small(t: Tensor) -> bool:
        return is_parameter(t) or 16 * t.numel() <= numel

    def format_of(t: Tensor) -> Format:
        return Dense() if small(t) else format

    if small(a):
        a = _compact(a)
    if small(b):
        b = _compact(b)
    return MultiplyFunction.apply(input, a, b, value, format_of(a), format_of(b), need_a, need_b)


def _compact(t: Tensor) -> Tensor:
    """t, or a copy where a reference would keep much more alive: a slice of something large."""
    if torch.compiler.is_compiling() or is_parameter(t):
        return t
    own = t.numel() * t.element_size()
    return t.clone() if t.untyped_storage().nbytes() > 2 * own else t
