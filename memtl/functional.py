"""Drop-in functions: PyTorch's own signatures and forward results, and a format for what is kept.

Each one checks its arguments and makes one call of one ``torch.autograd.Function``. Where nothing
needs a gradient it is PyTorch's function and keeps nothing. ``format`` is a
:class:`memtl.storage.Format`; which gradients it makes approximate is said in each docstring, all
others are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import activation as _activation
from .autograd import attention as _attention
from .autograd import convolution as _convolution
from .autograd import linear as _linear
from .autograd import norm as _norm
from .storage import Dense, Format, Quantized, TopK

__all__ = [
    "dropout",
    "gelu",
    "gelu_new",
    "layer_norm",
    "linear",
    "matmul",
    "patch_conv2d",
    "quick_gelu",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
]

LINEAR = TopK(keep=0.1)
FOUR_BITS = Quantized(bits=4)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    format: Format = LINEAR,
    transposed: bool = False,
) -> Tensor:
    """y = x W^T + b, with x kept in ``format`` for the weight gradient.

    Args:
        x: [..., D], floating point.
        weight: [O, D]; with ``transposed`` [D, O], as in Hugging Face's ``Conv1D``.
        bias: [O] or None.
        format: how x is kept; the weight gradient is taken from it.

    Raises:
        TypeError: an argument is no tensor, or sparse, or not of a real floating-point type.
        ValueError: shapes do not fit.

    Memory: ``format.nbytes(x)``, nothing if the weight needs no gradient. Back Razor (Jiang et al.,
    NeurIPS 2022) is this with ``TopK``.
    """
    _check_tensors("linear", x=x, weight=weight, bias=bias)
    _check_format("linear", format)
    features = weight.shape[0 if transposed else -1]
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != features:
        wanted = "[D, O]" if transposed else "[O, D]"
        raise ValueError(
            f"linear: expected x [..., D] and weight {wanted}, got {_shape(x)} and {_shape(weight)}"
        )
    _check_shape("linear", "bias", bias, (weight.shape[1 if transposed else 0],), x)
    if transposed and bias is None:
        bias = weight.new_zeros(weight.shape[1])
    need_x, need_weight, need_bias = _needs(x, weight, bias)
    if not (need_x or need_weight or need_bias):
        if not transposed:
            return F.linear(x, weight, bias)
    x, cast = _autocast(x)
    return _linear.LinearFunction.apply(
        x, weight, bias, format, cast, transposed, need_x, need_weight
    )


def patch_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, format: Format = LINEAR
) -> Tensor:
    """``F.conv2d`` with the stride equal to the kernel: the patch embedding of a ViT.

    Args:
        x: [B, C, H, W] or [C, H, W], floating point.
        weight: [O, C, p, q].
        bias: [O] or None.
        format: how the patches [B, (H // p)(W // q), C p q] are kept; the weight gradient is taken
            from them.

    Raises:
        TypeError, ValueError: as :func:`linear`.

    Memory: ``format.nbytes`` of the patches, nothing if the weight needs no gradient.
    """
    _check_tensors("patch_conv2d", x=x, weight=weight, bias=bias)
    _check_format("patch_conv2d", format)
    if x.dim() not in (3, 4) or weight.dim() != 4 or x.shape[-3] != weight.shape[1]:
        raise ValueError(
            "patch_conv2d: expected x [B, C, H, W] and weight [O, C, p, q], got "
            f"{_shape(x)} and {_shape(weight)}"
        )
    _check_shape("patch_conv2d", "bias", bias, weight.shape[:1], x)
    need_x, need_weight, need_bias = _needs(x, weight, bias)
    if not (need_x or need_weight or need_bias):
        return F.conv2d(x, weight, bias, stride=weight.shape[2:])
    if x.dim() == 3:
        return patch_conv2d(x.unsqueeze(0), weight, bias, format=format).squeeze(0)
    x, cast = _autocast(x)
    return _convolution.PatchConvolutionFunction.apply(
        x, weight, bias, format, cast, need_x, need_weight
    )


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    format: Format = FOUR_BITS,
) -> Tensor:
    """``F.layer_norm``, with the normalised input x-hat kept in ``format``.

    The gradients of x and of the weight are taken from it.

    Args:
        x: [..., *normalized_shape], floating point.
        weight, bias: of shape ``normalized_shape``, or None.

    Raises:
        TypeError, ValueError: as :func:`linear`.

    Memory: ``format.nbytes(x)`` and one number a row.
    """
    _check_tensors("layer_norm", x=x, weight=weight, bias=bias)
    shape = _check_normalized("layer_norm", x, normalized_shape, format)
    _check_shape("layer_norm", "weight", weight, shape, x)
    _check_shape("layer_norm", "bias", bias, shape, x)
    need_x, need_weight, need_bias = _needs(x, weight, bias)
    if not (need_x or need_weight or need_bias):
        return F.layer_norm(x, shape, weight, bias, eps)
    return _norm.LayerNormFunction.apply(x, weight, bias, shape, eps, format, need_x, need_weight)[
        0
    ]


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    format: Format = FOUR_BITS,
    llama: bool = False,
) -> Tensor:
    """``F.rms_norm``, with x / rms(x) kept in ``format``; see :func:`layer_norm`.

    ``llama``: round as transformers' LlamaRMSNorm and its kin do (normalise in float32, cast, then
    multiply by the weight).
    """
    _check_tensors("rms_norm", x=x, weight=weight)
    shape = _check_normalized("rms_norm", x, normalized_shape, format)
    _check_shape("rms_norm", "weight", weight, shape, x)
    need_x, need_weight = _needs(x, weight)
    if not (need_x or need_weight):
        return _norm.llama_rms_norm(x, weight, eps) if llama else F.rms_norm(x, shape, weight, eps)
    return _norm.RMSNormFunction.apply(x, weight, shape, eps, format, llama, need_x, need_weight)


def gelu(x: Tensor, approximate: str = "none", *, format: Format = FOUR_BITS) -> Tensor:
    """``F.gelu``, both forms.

    Under a ``Quantized`` format what is kept is the derivative, in a fixed-range code of that many
    bits; under any other format x itself.

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: ``approximate`` is neither ``"none"`` nor ``"tanh"``.

    Memory: numel * bits / 8 bytes, or ``format.nbytes(x)``.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _elementwise("gelu" if approximate == "none" else "gelu_tanh", x, format)


def gelu_new(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """The tanh form of GELU as transformers writes it out (GPT-2); see :func:`gelu`."""
    return _elementwise("gelu_new", x, format)


def quick_gelu(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """x * sigmoid(1.702 x), the activation of CLIP; see :func:`gelu`."""
    return _elementwise("quick_gelu", x, format)


def silu(x: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """``F.silu``, x * sigmoid(x); see :func:`gelu`."""
    return _elementwise("silu", x, format)


def relu(x: Tensor) -> Tensor:
    """``F.relu``; its gradient is exact. Memory: one bit an element."""
    _check_tensors("relu", x=x)
    return _activation.ReLUFunction.apply(x) if any(_needs(x)) else F.relu(x)


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """``F.dropout``, drawing the same mask from the same generator; its gradient is exact.

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: p is outside [0, 1].

    Memory: one bit an element.
    """
    _check_tensors("dropout", x=x)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    if not training or p == 0 or not any(_needs(x)):
        return F.dropout(x, p, training)
    return _activation.DropoutFunction.apply(x, p)[0]


def softmax(
    x: Tensor, dim: int = -1, dtype: torch.dtype | None = None, *, format: Format = FOUR_BITS
) -> Tensor:
    """``F.softmax``, with its result kept in ``format``, from which the gradient is taken.

    Memory: ``format.nbytes(y)``.
    """
    _check_tensors("softmax", x=x)
    _check_format("softmax", format)
    if not any(_needs(x)):
        return F.softmax(x, dim, dtype=dtype)
    return _attention.SoftmaxFunction.apply(x, dim, dtype, format)


def matmul(a: Tensor, b: Tensor, *, format: Format = FOUR_BITS) -> Tensor:
    """``torch.matmul`` of two activations, both kept in ``format`` for the other one's gradient.

    Args:
        a: [..., N, K]; b: [..., K, M]. With a one-dimensional operand this is ``torch.matmul``.

    Raises:
        TypeError: an operand is no dense floating-point tensor.
        ValueError: shapes do not fit.

    Memory: ``format.nbytes`` of each operand whose partner needs a gradient; an operand that is a
    parameter is there anyway and is kept by reference, exactly.
    """
    _check_tensors("matmul", a=a, b=b)
    _check_format("matmul", format)
    if a.dim() > 1 and b.dim() > 1:
        fits = a.shape[-1] == b.shape[-2] and _broadcastable(a.shape[:-2], b.shape[:-2])
        if not fits:
            raise ValueError(
                f"matmul: expected a [..., N, K] and b [..., K, M], got {_shape(a)} and {_shape(b)}"
            )
    need_a, need_b = _needs(a, b)
    if not (need_a or need_b) or a.dim() < 2 or b.dim() < 2:
        return torch.matmul(a, b)
    format_a, format_b = (Dense() if isinstance(t, nn.Parameter) else format for t in (a, b))
    (a, _), (b, _) = _autocast(a), _autocast(b)
    return _linear.MatmulFunction.apply(a, b, format_a, format_b, need_a, need_b)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    format: Format = FOUR_BITS,
) -> Tensor:
    """``F.scaled_dot_product_attention``, with its operands kept in ``format``.

    The gradients of query, key, value and a mask that trains are taken from the stored operands:
    backward runs torch's own fused attention on them again. Under a ``TopK`` format the
    probabilities are kept as well, in that format, since a softmax recomputed from pruned operands
    would be far off.

    Args:
        query: [..., H, N, d]; key, value: [..., H or fewer with ``enable_gqa``, S, d].
        attn_mask: bool (True takes part) or additive, broadcastable to [..., N, S].

    Raises:
        TypeError, ValueError: as :func:`linear`.

    Memory: ``format.nbytes`` of the three operands, a reference to the mask; with dropout the
    generator's state (5 KiB on CPU, 16 bytes on CUDA), or under ``torch.compile`` one bit for each
    of the H N S probabilities beside the probabilities in ``format``.
    """
    name = "scaled_dot_product_attention"
    _check_tensors(name, query=query, key=key, value=value)
    _check_format(name, format)
    _check_attention(name, query, key, value, attn_mask, is_causal)
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    mask_needed = attn_mask is not None and any(_needs(attn_mask))
    if not (any(_needs(query, key, value)) or mask_needed):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    (query, cast), (key, _), (value, _) = _autocast(query), _autocast(key), _autocast(value)
    if cast is not None and attn_mask is not None and attn_mask.is_floating_point():
        options = (attn_mask.to(cast), *options[1:])
    if isinstance(format, TopK) or (dropout_p > 0 and torch.compiler.is_compiling()):
        return _attention.ExplicitAttentionFunction.apply(query, key, value, *options, format)[0]
    rng_state = None
    if dropout_p > 0:
        cuda = query.is_cuda
        rng_state = torch.cuda.get_rng_state(query.device) if cuda else torch.get_rng_state()
    return _attention.AttentionFunction.apply(query, key, value, *options, format, rng_state)


# ------------------------------------------------------------------------------------------ checks


def _elementwise(name: str, x: Tensor, format: Format) -> Tensor:
    _check_tensors(name, x=x)
    _check_format(name, format)
    if not any(_needs(x)):
        return _activation.ACTIVATIONS[name].forward(x)
    return _activation.ActivationFunction.apply(x, name, format)


def _needs(*tensors: Tensor | None) -> list[bool]:
    """Which of these will be asked for a gradient."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def _autocast(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """x as autocast hands it to a matrix product, and the dtype that weights are to be cast to."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, None
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), dtype


def _check_tensors(name: str, **tensors: Tensor | None) -> None:
    for argument, t in tensors.items():
        if t is None and argument in ("bias", "weight"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(
                f"{name}: {argument} must be of a real floating-point dtype, got {t.dtype}"
            )
        if t.layout != torch.strided:
            raise TypeError(f"{name}: {argument} must be dense (strided), got {t.layout}")


def _check_format(name: str, format: Format) -> None:
    if not isinstance(format, Format):
        raise TypeError(
            f"{name}: format must be a memtl.storage.Format, got {type(format).__name__}"
        )
    if isinstance(format, TopK) and format.keep is None:
        raise ValueError(f"{name}: format {format} leaves `keep` open: give a fraction in (0, 1]")


def _check_normalized(
    name: str, x: Tensor, normalized_shape: Sequence[int], format: Format
) -> tuple[int, ...]:
    _check_format(name, format)
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"{name}: expected x [..., {', '.join(map(str, shape))}], got {_shape(x)}")
    return shape


def _check_shape(
    name: str, argument: str, t: Tensor | None, wanted: Sequence[int], x: Tensor
) -> None:
    if t is not None and tuple(t.shape) != tuple(wanted):
        raise ValueError(
            f"{name}: expected {argument} {list(wanted)} for x {_shape(x)}, got {_shape(t)}"
        )


def _check_attention(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> None:
    enough = min(query.dim(), key.dim(), value.dim()) >= 2
    if not enough or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{name}: expected query [..., N, d], key [..., S, d] and value [..., S, e], got "
            f"{_shape(query)}, {_shape(key)} and {_shape(value)}"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: attn_mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: attn_mask must be bool or floating point, got {mask.dtype}")
    if is_causal:
        raise ValueError(f"{name}: expected attn_mask or is_causal, got both")


def _broadcastable(a: Sequence[int], b: Sequence[int]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
