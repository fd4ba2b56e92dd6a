"""Attention: the fused function, and softmax for those who write it by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd.attention import AttentionFunction, ExplicitAttentionFunction, SoftmaxFunction
from ..storage import Format, TopK
from .common import FOUR_BITS, autocast, check_format, check_tensors, needs, sizes


def softmax(
    x: Tensor, dim: int = -1, dtype: torch.dtype | None = None, *, format: Format = FOUR_BITS
) -> Tensor:
    """``F.softmax``, with its result kept in ``format``, from which the gradient is taken.

    Memory: ``format.nbytes(y)``.
    """
    check_tensors("softmax", x=x)
    check_format("softmax", format)
    if not any(needs(x)):
        return F.softmax(x, dim, dtype=dtype)
    return SoftmaxFunction.apply(x, dim, dtype, format)


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
    backward computes attention from them again. Under a ``TopK`` format the
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
    check_tensors(name, query=query, key=key, value=value)
    check_format(name, format)
    _check_attention(name, query, key, value, attn_mask, is_causal)
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    mask_needed = attn_mask is not None and any(needs(attn_mask))
    if not (any(needs(query, key, value)) or mask_needed):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    (query, cast), (key, _), (value, _) = autocast(query), autocast(key), autocast(value)
    if cast is not None and attn_mask is not None and attn_mask.is_floating_point():
        options = (attn_mask.to(cast), *options[1:])
    if isinstance(format, TopK) or (dropout_p > 0 and torch.compiler.is_compiling()):
        return ExplicitAttentionFunction.apply(query, key, value, *options, format)[0]
    rng_state = None
    if dropout_p > 0:
        cuda = query.is_cuda
        rng_state = torch.cuda.get_rng_state(query.device) if cuda else torch.get_rng_state()
    return AttentionFunction.apply(query, key, value, *options, format, rng_state)


def _check_attention(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> None:
    enough = min(query.dim(), key.dim(), value.dim()) >= 2
    if not enough or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{name}: expected query [..., N, d], key [..., S, d] and value [..., S, e], got "
            f"{sizes(query)}, {sizes(key)} and {sizes(value)}"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: attn_mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: attn_mask must be bool or floating point, got {mask.dtype}")
    if is_causal:
        raise ValueError(f"{name}: expected attn_mask or is_causal, got both")
