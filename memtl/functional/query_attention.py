"""Attention of a few trained queries to frozen keys and values."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..autograd.query_attention import QueryAttentionFunction, bytes_kept
from .common import autocast, check_tensors, needs, sizes

KEEPS = ("auto", "jacobian", "kv")


def query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    *,
    keep: Literal["auto", "jacobian", "kv"] = "auto",
    jacobian_dtype: torch.dtype | None = None,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of queries that train to keys and values that do not.

    The gradient has a closed form: dq = J d(out), J = scale * (K^T diag(p) V - (K^T p)(V^T p)^T),
    the scaled covariance of keys and values under the attention p, a d x e matrix for each query
    that is made beside the output. Keeping J instead of keys and values takes fewer bytes up to
    about T = 2 N / d queries; both are exact.

    Args:
        query: [B or 1, H, T, d]; 1 is the same queries for every sample.
        key: [B, H, N, d]. value: [B, H, N, e].
        attn_mask: which keys take part (bool), or what is added to the scores, of a shape that
            broadcasts to [B, H, 1, N]. It gets no gradient.
        scale: of the scores; None for 1 / sqrt(d).
        keep: "jacobian" keeps J, "kv" query, key and value, "auto" whichever is fewer bytes.
        jacobian_dtype: of J; None for float32, float64 for float64. bfloat16 halves J, and its
            rounding is the error of the gradient, 2**-9 of each entry.

    Returns:
        [B, H, T, e]; a query that no key takes part in gets zeros.

    Raises:
        TypeError: no tensors, or not of one real floating-point dtype.
        ValueError: shapes that do not fit; ``keep`` that is none of the three.
        NotImplementedError: a key, value or mask that requires a gradient: there is none here.

    Memory: B H T d e elements of J; or those of query, key, value and the mask.
    Source: queries that read a frozen network are Visual Query Tuning's (Tu, Mai and Chao,
    CVPR 2023); the closed form is memtl's.
    """
    name = "query_attention"
    check_tensors(name, query=query, key=key, value=value)
    if keep not in KEEPS:
        raise ValueError(f"{name}: keep must be one of {KEEPS}, got {keep!r}")
    if jacobian_dtype is not None and not (
        isinstance(jacobian_dtype, torch.dtype) and jacobian_dtype.is_floating_point
    ):
        raise TypeError(
            f"{name}: jacobian_dtype must be a floating-point dtype, got {jacobian_dtype!r}"
        )
    (query, _), (key, _), (value, _) = autocast(query), autocast(key), autocast(value)
    _check(name, query, key, value)
    mask = None if attn_mask is None else _additive(name, attn_mask, key)
    if any(needs(key, value, attn_mask)):
        raise NotImplementedError(
            f"{name}: key, value and mask get no gradient here: detach() them, or call "
            "F.scaled_dot_product_attention for theirs"
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if not any(needs(query)):
        return torch.ops.memtl.query_attention(query, key, value, mask, scale, None)[0]
    jacobian = None
    if keep != "kv":
        jacobian = jacobian_dtype or torch.promote_types(query.dtype, torch.float32)
        if keep == "auto":
            with_j, without = (bytes_kept(query, key, value, j) for j in (jacobian, None))
            jacobian = jacobian if with_j <= without else None
    return QueryAttentionFunction.apply(query, key, value, mask, scale, jacobian)[0]


def _check(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{name}: expected query, key and value of one dtype, got {query.dtype}, {key.dtype} "
            f"and {value.dtype}"
        )
    right = query.dim() == key.dim() == value.dim() == 4 and (
        query.shape[0] in (1, key.shape[0])
        and query.shape[1] == key.shape[1]
        and query.shape[3] == key.shape[3]
        and key.shape[:3] == value.shape[:3]
    )
    if not right:
        raise ValueError(
            f"{name}: expected query [B or 1, H, T, d], key [B, H, N, d] and value [B, H, N, e], "
            f"got {sizes(query)}, {sizes(key)} and {sizes(value)}"
        )


def _additive(name: str, mask: Tensor, key: Tensor) -> Tensor:
    """[B or 1, H or 1, N], added to the scores."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: attn_mask must be a bool or floating-point tensor, got {got}")
    batch, heads, n, _ = key.shape
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if (
        len(shape) != 4
        or shape[0] not in (1, batch)
        or shape[1] not in (1, heads)
        or shape[2] != 1
        or shape[3] not in (1, n)
    ):
        raise ValueError(
            f"{name}: expected attn_mask that broadcasts to [{batch}, {heads}, 1, {n}] for key "
            f"{sizes(key)}, got {sizes(mask)}"
        )
    mask = mask.reshape(shape).expand(-1, -1, -1, n)[:, :, 0]
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return zeros.masked_fill_(~mask, -math.inf)
    return mask
