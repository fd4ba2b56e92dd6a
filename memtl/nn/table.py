"""The functions memtl serves inside a module: what is called in their place, and what that keeps.

To add one, give it a row in :data:`CALLS`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..autograd.keep import is_parameter
from ..functional.product import einsum_indices
from ..storage import Format
from .layers import kept_of_activation


@dataclasses.dataclass(frozen=True)
class Call:
    """One row: the role whose format is taken, the function that serves, and what it keeps.

    ``serve(format, *args, **kwargs)`` takes the arguments of the function it stands for, and
    answers NotImplemented to those that are to stay torch's: into ``out``, along a named dimension.
    """

    role: str
    serve: Callable[..., Any]
    kept: Callable[[Format], str] = str


def _same(function: Callable, **renamed: str) -> Callable[..., Any]:
    """Serve by a function of :mod:`memtl.functional` whose parameters are torch's but for names."""
    parameters = inspect.signature(function).parameters
    known = frozenset(parameters)
    most = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    formatted = "format" in known
    names = {"input": "x", **renamed}

    def serve(format: Format, *args: Any, **kwargs: Any) -> Any:
        kwargs = {names.get(name, name): value for name, value in kwargs.items()}
        if len(args) > most or not kwargs.keys() <= known:
            return NotImplemented
        if formatted:
            kwargs["format"] = format
        return function(*args, **kwargs)

    return serve


def _in_place(function: Callable) -> Callable[..., Any]:
    serve = _same(function)
    return lambda format, *args, **kwargs: serve(format, *args, **kwargs, inplace=True)


def _softmax(format: Format, input, dim=None, dtype=None, **rest):
    if rest or not isinstance(dim, int):
        return NotImplemented
    return functional.softmax(input, dim, dtype, format=format)


def _functional_softmax(format: Format, input, dim=None, _stacklevel=3, dtype=None):
    return _softmax(format, input, dim, dtype)


def _two(format: Format, function: Callable, a: Any, b: Any) -> Any:
    """A product of two tensors, where torch would keep both."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return NotImplemented
    if not (a.requires_grad and b.requires_grad):
        return NotImplemented  # keeps the constant one alone: a mask, a table of rotations
    return function(a, b, format=format)


def _mul(format: Format, input, other=None, **rest):
    return NotImplemented if rest else _two(format, functional.mul, input, other)


def _pow(format: Format, input, exponent, **rest):
    if rest or not isinstance(exponent, (int, float)) or exponent != 2:
        return NotImplemented
    return functional.square(input, format=format)


def _matmul(format: Format, input, other=None, *, mat2=None, **rest):
    other = mat2 if other is None else other
    if rest or not isinstance(other, Tensor):
        return NotImplemented
    return functional.matmul(input, other, format=format)


def _einsum(format: Format, *args):
    if len(args) != 3 or not isinstance(args[0], str) or einsum_indices(args[0]) is None:
        return NotImplemented
    equation, a, b = args
    if 1 in (*a.shape, *b.shape):
        return NotImplemented  # it may stand for any extent
    return _two(format, lambda a, b, format: functional.einsum(equation, a, b, format=format), a, b)


def _norm(format: Format, input, p="fro", dim=None, keepdim=False, dtype=None, **rest):
    if rest or dtype is not None or p not in (2, "fro") or dim is None:
        return NotImplemented
    return functional.vector_norm(input, dim, keepdim, format=format)


def _vector_norm(format: Format, x, ord=2, dim=None, keepdim=False, *, dtype=None, out=None):
    return NotImplemented if out is not None else _norm(format, x, ord, dim, keepdim, dtype)


def _normalize(format: Format, input, p=2.0, dim=1, eps=1e-12, out=None):
    if out is not None or p != 2 or not isinstance(dim, int):
        return NotImplemented
    return functional.normalize(input, p, dim, eps, format=format)


def _batch_norm(format: Format, input, *args, **kwargs):
    if is_parameter(input):  # standardised weights: torch keeps a reference
        return NotImplemented
    return _same(functional.batch_norm)(format, input, *args, **kwargs)


def _unpooled(function: Callable) -> Callable[..., Any]:
    """Serve a pooling function unless the indices are asked for."""
    serve = _same(function)

    def without_indices(format: Format, *args: Any, return_indices: bool = False, **kwargs: Any):
        return NotImplemented if return_indices else serve(format, *args, **kwargs)

    return without_indices


def _extreme(function: Callable) -> Callable[..., Any]:
    """Serve a maximum along dimensions; that of a whole tensor is torch's."""

    def serve(format: Format, input, dim=(), keepdim=False, **rest):
        whole = not isinstance(dim, int) and len(dim) == 0
        return NotImplemented if rest or whole else function(input, dim, keepdim)

    return serve


def _bit(format: Format) -> str:
    return "1 bit, exact"


def _nothing(format: Format) -> str:
    return "nothing"


def _places(format: Format) -> str:
    return "places of maxima, exact"


def _rows(role: str, served: dict[Callable, Callable], kept: Callable[[Format], str] = str):
    return {function: Call(role, serve, kept) for function, serve in served.items()}


CALLS: dict[Callable, Call] = {
    **_rows("linear", {F.linear: _same(functional.linear)}),
    **_rows(
        "convolution",
        {
            getattr(F, name): _same(getattr(functional, name))
            for kind in ("conv", "conv_transpose")
            for name in (f"{kind}1d", f"{kind}2d", f"{kind}3d")
        },
    ),
    **_rows(
        "attention",
        {
            F.scaled_dot_product_attention: _same(functional.scaled_dot_product_attention),
            F.softmax: _functional_softmax,
            torch.softmax: _softmax,
            Tensor.softmax: _softmax,
            torch.matmul: _matmul,
            torch.bmm: _matmul,
            Tensor.matmul: _matmul,
            Tensor.bmm: _matmul,
            torch.baddbmm: _same(functional.baddbmm, input="input", batch1="a", batch2="b"),
            Tensor.baddbmm: _same(functional.baddbmm, input="input", batch1="a", batch2="b"),
            torch.einsum: _einsum,
        },
    ),
    **_rows(
        "norm",
        {
            F.layer_norm: _same(functional.layer_norm),
            F.rms_norm: _same(functional.rms_norm),
            F.batch_norm: _batch_norm,
            F.group_norm: _same(functional.group_norm),
            F.instance_norm: _same(functional.instance_norm),
            F.normalize: _normalize,
            torch.norm: _norm,
            Tensor.norm: _norm,
            torch.linalg.vector_norm: _vector_norm,
        },
    ),
    **_rows(
        "activation",
        {
            F.gelu: _same(functional.gelu),
            F.silu: _same(functional.silu),
            F.mish: _same(functional.mish),
            F.hardswish: _same(functional.hardswish),
            F.elu: _same(functional.elu),
            F.elu_: _in_place(functional.elu),
            F.selu: _same(functional.selu),
            F.selu_: _in_place(functional.selu),
            F.celu: _same(functional.celu),
            F.celu_: _in_place(functional.celu),
            F.softplus: _same(functional.softplus),
            F.logsigmoid: _same(functional.logsigmoid),
            torch.tanh: _same(functional.tanh),
            Tensor.tanh: _same(functional.tanh),
            Tensor.tanh_: _in_place(functional.tanh),
            torch.sigmoid: _same(functional.sigmoid),
            Tensor.sigmoid: _same(functional.sigmoid),
            Tensor.sigmoid_: _in_place(functional.sigmoid),
        },
        kept_of_activation,
    ),
    **_rows(
        "activation",
        {
            F.relu: _same(functional.relu),
            torch.relu: _same(functional.relu),
            Tensor.relu: _same(functional.relu),
            torch.relu_: _in_place(functional.relu),
            Tensor.relu_: _in_place(functional.relu),
            F.relu6: _same(functional.relu6),
            F.hardtanh: _same(functional.hardtanh),
            F.hardtanh_: _in_place(functional.hardtanh),
            F.hardsigmoid: _same(functional.hardsigmoid),
            F.leaky_relu: _same(functional.leaky_relu),
            F.leaky_relu_: _in_place(functional.leaky_relu),
            F.threshold: _same(functional.threshold),
            torch.threshold_: _in_place(functional.threshold),
            F.dropout: _same(functional.dropout),
            torch.amax: _extreme(functional.amax),
            Tensor.amax: _extreme(functional.amax),
            torch.amin: _extreme(functional.amin),
            Tensor.amin: _extreme(functional.amin),
        },
        _bit,
    ),
    **_rows(
        "activation",
        {
            F.prelu: _same(functional.prelu),
            torch.square: _same(functional.square),
            Tensor.square: _same(functional.square),
            torch.pow: _pow,
            Tensor.pow: _pow,
            Tensor.__pow__: _pow,
            torch.mul: _mul,
            Tensor.mul: _mul,
            torch.addcmul: _same(functional.addcmul, input="input", tensor1="a", tensor2="b"),
            Tensor.addcmul: _same(functional.addcmul, input="input", tensor1="a", tensor2="b"),
        },
    ),
    **_rows(
        "activation",
        {
            getattr(F, name): _unpooled(getattr(functional, name))
            for kind in ("max_pool", "adaptive_max_pool")
            for name in (f"{kind}1d", f"{kind}2d", f"{kind}3d")
        },
        _places,
    ),
    **_rows(
        "activation",
        {
            getattr(F, name): _same(getattr(functional, name))
            for kind in ("avg_pool", "adaptive_avg_pool")
            for name in (f"{kind}1d", f"{kind}2d", f"{kind}3d")
        },
        _nothing,
    ),
    F.pad: Call("convolution", _same(functional.pad), _nothing),  # by which convolutions reflect
}
"""Function -> its row."""

METHODS = {f.__name__: f for f in CALLS if getattr(Tensor, f.__name__, None) is f}
"""Name -> method of ``Tensor`` among them."""
