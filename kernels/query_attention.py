"""A few queries that read keys and values, in Triton: the output, its Jacobian, its gradient.

With p = softmax(scale q k^T + mask) by row, and p = 0 in a row that no key takes part in:

``query_attention``       out = p v and, on request, of every query
                          J[i, j] = scale * sum over n of p_n (k_ni - mean k_i) (v_nj - out_j).
``query_attention_grad``  dq[i] = scale * sum over n of p_n (g_n - mean g) (k_ni - mean k_i),
                          g_n = grad_out . v_n; means are weighted by p.

Keys and values are read once, in blocks, and the softmax is online: weights are exp(score - best)
with the best score so far, and what was summed up is multiplied by exp(old best - best).
Keys and values may lie far from 0, so a covariance is never the difference of two sums. That of
two sets, of weights W and W' and means m and m', is the sum of both covariances and of
W W' / (W + W') (m' - m) (m' - m)^T: a block is centered on its own mean, and then joined.

J is 2 N operations for each of B H T d e elements; a program makes a tile of that of one query.
The others are bound by reading k and v; a program takes 16 queries, which share what is read.

All is computed in float32, in float64 for float64. Products of two 16-bit numbers are exact in it,
so the tensor cores make scores of such as they are. Sums by weights they make in tf32, whose 11
bits are all that a 16-bit number has: a weight is two of those, which makes two products, and
beside what is centered, in J, three (tf32x3). float32 keeps to the other cores: its gradients are
to be as close as the plain formula's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtl._ops import FLOATING, _check_query_attention

from .common import check_devices

QUERIES = 16
"""Of a program that makes no J: the rows of a tensor core."""
FACTORS = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    # Triton's interpreter would multiply its bits.
    torch.bfloat16: tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
}
"""What queries and keys are multiplied as."""


@triton.jit
def _wide(x):
    """float64 as it is, else float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _store(ptr, x, mask):
    """x in the dtype of ptr, by way of float32 if that is not float64, as torch rounds."""
    if ptr.dtype.element_ty.primitive_bitwidth < 64:
        x = x.to(tl.float32)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _inverse(total):
    """1 / total; 0 where no key takes part, or so little that the inverse might overflow."""
    return 1.0 / tl.where(total < 1e-30, float("inf"), total)


@triton.jit
def _shift(best):
    """What scores are lowered by before exp: the best, but -inf less that must not be NaN."""
    return tl.where(best == float("-inf"), 0.0, best)


@triton.jit
def _rows(ptr, batch, head, row, strides):
    """Pointers to ptr[batch, head, row], in 64 bits."""
    return ptr + batch * strides[0] + head * strides[1] + row.to(tl.int64) * strides[2]


@triton.jit
def _load(rows, inside, column, columns, stride):
    """rows[:, column]; 0 outside."""
    ptr = rows[:, None] + column[None, :].to(tl.int64) * stride
    mask = inside[:, None] & (column < columns)[None, :]
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _tile(rows, inside, column, columns, stride):
    """The same, wide."""
    return _wide(_load(rows, inside, column, columns, stride))


@triton.jit
def _products(
    a,
    a_inside,
    a_stride,
    b,
    b_inside,
    b_stride,
    columns,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """a b^T, of rows at a and at b, multiplied as FACTOR; WIDTH is ``columns`` rounded up to whole
    blocks."""
    products = tl.zeros((a.shape[0], b.shape[0]), WIDE)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = _load(a, a_inside, column, columns, a_stride).to(FACTOR)
        y = tl.trans(_load(b, b_inside, column, columns, b_stride).to(FACTOR))
        products = tl.dot(x, y, products, input_precision="ieee", out_dtype=WIDE)
    return products


@triton.jit
def _weighted(weights, x, PRECISION: tl.constexpr):
    """weights x, of x in 16 bits, or of any x in PRECISION "ieee"."""
    if PRECISION == "ieee":
        products = tl.dot(weights, x, input_precision=PRECISION, out_dtype=x.dtype)
    else:
        bits = weights.to(tl.int32, bitcast=True)
        high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)  # rounded to 11 bits
        products = tl.dot(high, x, input_precision="tf32")
        products = tl.dot(weights - high, x, products, input_precision="tf32")
    return products


@triton.jit
def _added(mask_ptr, batch, head, key, strides, N, WIDE: tl.constexpr):
    """What is added to the scores of the keys: the mask, 0 without one, -inf beyond N."""
    if mask_ptr is None:
        added = tl.where(key < N, 0.0, float("-inf")).to(WIDE)
    else:
        row = _rows(mask_ptr, batch, head, key, strides)
        added = tl.load(row, mask=key < N, other=float("-inf")).to(WIDE)
    return added


@triton.jit
def _out_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    scale: tl.float64,
    H,
    T,
    N,
    d,
    e,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    WIDE: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """out[t, j] = sum over n of p[t, n] v[n, j], for QUERIES rows t and BLOCK_E columns j."""
    tiles = tl.cdiv(T, QUERIES)
    head = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    batch, head = (head // H).to(tl.int64), (head % H).to(tl.int64)
    j = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    queries = _rows(q_ptr, batch, head, t, q_strides)
    best = tl.full((QUERIES,), float("-inf"), WIDE)
    total = tl.zeros((QUERIES,), WIDE)
    sums = tl.zeros((QUERIES, BLOCK_E), WIDE)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = _rows(k_ptr, batch, head, n, k_strides)
        values = _rows(v_ptr, batch, head, n, v_strides)
        products = _products(
            queries, t < T, q_strides[3], keys, n < N, k_strides[3], d, WIDE, WIDTH, BLOCK_D, FACTOR
        )
        added = _added(mask_ptr, batch, head, n, mask_strides, N, WIDE)
        scores = products * tl.full((1, 1), scale, WIDE) + added[None, :]
        new = tl.maximum(best, tl.max(scores, 1))
        fade = tl.exp(best - _shift(new))
        weights = tl.exp(scores - _shift(new)[:, None])
        v = _tile(values, n < N, j, e, v_strides[3])
        sums *= fade[:, None]
        sums += _weighted(weights, v, PRECISION)
        total = total * fade + tl.sum(weights, 1)
        best = new
    out = sums * _inverse(total)[:, None]
    rows = out_ptr + ((batch * H + head) * T + t) * e
    inside = (t < T)[:, None] & (j < e)[None, :]
    _store(rows[:, None] + j[None, :], out, inside)


@triton.jit
def _jacobian_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    jacobian_ptr,
    scale: tl.float64,
    H,
    T,
    N,
    d,
    e,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """J[i, j] and out[j] of one query, for BLOCK_D rows i and BLOCK_E columns j."""
    query = tl.program_id(0).to(tl.int64)  # of B H T, those that share keys beside each other
    batch, head, t = query // T // H, query // T % H, query % T
    i = tl.arange(0, BLOCK_D)
    if WIDTH > BLOCK_D:  # where it is all there is, it is read once, for the scores and for J
        i += tl.program_id(1) * BLOCK_D
    j = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    q = _rows(q_ptr, batch, head, t, q_strides)
    best = tl.full((1,), float("-inf"), WIDE)
    total = tl.zeros((1,), WIDE)
    sum_k = tl.zeros((BLOCK_D,), WIDE)
    sum_v = tl.zeros((BLOCK_E,), WIDE)
    covariance = tl.zeros((BLOCK_D, BLOCK_E), WIDE)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = _rows(k_ptr, batch, head, n, k_strides)
        values = _rows(v_ptr, batch, head, n, v_strides)
        products = tl.zeros((BLOCK_N,), WIDE)
        for first in range(0, WIDTH, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            k = _tile(keys, n < N, column, d, k_strides[3])
            x = tl.load(q + column.to(tl.int64) * q_strides[3], mask=column < d, other=0.0)
            products += tl.sum(k * _wide(x)[None, :], 1)
        k = _tile(keys, n < N, i, d, k_strides[3])
        added = _added(mask_ptr, batch, head, n, mask_strides, N, WIDE)
        scores = products * tl.full((1,), scale, WIDE) + added
        new = tl.maximum(best, tl.max(scores, 0, keep_dims=True))
        fade = tl.exp(best - _shift(new))
        weights = tl.exp(scores - _shift(new))
        v = _tile(values, n < N, j, e, v_strides[3])
        weight = tl.sum(weights, 0, keep_dims=True)
        block_k = tl.sum(weights[:, None] * k, 0)
        block_v = tl.sum(weights[:, None] * v, 0)
        total *= fade
        sum_k *= fade
        sum_v *= fade
        mean_k = block_k * _inverse(weight)
        mean_v = block_v * _inverse(weight)
        joined = total * weight * _inverse(total + weight)
        apart_k = joined * (mean_k - sum_k * _inverse(total))
        apart_v = mean_v - sum_v * _inverse(total)
        k = weights[:, None] * (k - mean_k[None, :])
        v -= mean_v[None, :]
        covariance = covariance * fade[:, None] + apart_k[:, None] * apart_v[None, :]
        covariance += tl.dot(tl.trans(k), v, input_precision=PRECISION, out_dtype=WIDE)
        total += weight
        sum_k += block_k
        sum_v += block_v
        best = new
    if tl.program_id(1) == 0:
        out = sum_v * _inverse(total)
        _store(out_ptr + query * e + j, out, j < e)
    jacobian = covariance * (_inverse(total) * tl.full((1,), scale, WIDE))[:, None]
    rows = jacobian_ptr + query * d * e + i * e
    inside = (i < d)[:, None] & (j < e)[None, :]
    _store(rows[:, None] + j[None, :], jacobian, inside)


@triton.jit
def _grad_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    grad_ptr,
    grad_out_strides,
    scale: tl.float64,
    H,
    T,
    N,
    d,
    e,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    WIDE: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH_D: tl.constexpr,
    WIDTH_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """dq[t, i] for QUERIES rows t and BLOCK_D columns i."""
    tiles = tl.cdiv(T, QUERIES)
    head = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    batch, head = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = tl.arange(0, BLOCK_D)
    if WIDTH_D > BLOCK_D:  # as above
        i += tl.program_id(1) * BLOCK_D
    queries = _rows(q_ptr, batch, head, t, q_strides)
    grads_out = _rows(grad_out_ptr, batch, head, t, grad_out_strides)
    best = tl.full((QUERIES,), float("-inf"), WIDE)
    total = tl.zeros((QUERIES,), WIDE)
    sum_g = tl.zeros((QUERIES,), WIDE)
    sum_k = tl.zeros((QUERIES, BLOCK_D), WIDE)
    covariance = tl.zeros((QUERIES, BLOCK_D), WIDE)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = _rows(k_ptr, batch, head, n, k_strides)
        values = _rows(v_ptr, batch, head, n, v_strides)
        products = _products(
            queries,
            t < T,
            q_strides[3],
            keys,
            n < N,
            k_strides[3],
            d,
            WIDE,
            WIDTH_D,
            BLOCK_D,
            FACTOR,
        )
        g = _products(
            grads_out,
            t < T,
            grad_out_strides[3],
            values,
            n < N,
            v_strides[3],
            e,
            WIDE,
            WIDTH_E,
            BLOCK_E,
            FACTOR,
        )
        added = _added(mask_ptr, batch, head, n, mask_strides, N, WIDE)
        scores = products * tl.full((1, 1), scale, WIDE) + added[None, :]
        new = tl.maximum(best, tl.max(scores, 1))
        fade = tl.exp(best - _shift(new))
        weights = tl.exp(scores - _shift(new)[:, None])
        k = _tile(keys, n < N, i, d, k_strides[3])
        weight = tl.sum(weights, 1)
        block_g = tl.sum(weights * g, 1)
        block_k = _weighted(weights, k, PRECISION)
        total *= fade
        sum_g *= fade
        sum_k *= fade[:, None]
        mean_g = block_g * _inverse(weight)
        joined = total * weight * _inverse(total + weight)
        apart_g = joined * (mean_g - sum_g * _inverse(total))
        apart_k = block_k * _inverse(weight)[:, None] - sum_k * _inverse(total)[:, None]
        weights *= g - mean_g[:, None]
        covariance = covariance * fade[:, None] + apart_g[:, None] * apart_k
        covariance += _weighted(weights, k, PRECISION)
        total += weight
        sum_g += block_g
        sum_k += block_k
        best = new
    grad = covariance * (_inverse(total) * tl.full((1,), scale, WIDE))[:, None]
    rows = grad_ptr + ((batch * H + head) * T + t) * d
    inside = (t < T)[:, None] & (i < d)[None, :]
    _store(rows[:, None] + i[None, :], grad, inside)


def _block(width: int, itemsize: int) -> int:
    """Columns of a tile: a power of two that a tensor core takes and the registers hold."""
    return min(max(triton.next_power_of_2(width), 16), 64 if itemsize < 8 else 32)


def _tiles(width: int, block: int) -> int:
    """Of ``width`` columns; one of none, too, since the other width may have some."""
    return max(triton.cdiv(width, block), 1)


def _options(dtype: torch.dtype) -> dict[str, Any]:
    """What all three kernels are compiled with."""
    return {
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32x3" if dtype.itemsize == 2 else "ieee",
        "num_warps": 4,
        "num_stages": 2,
    }


def _out_options(dtype: torch.dtype, d: int, e: int) -> dict[str, Any]:
    block = _block(d, dtype.itemsize)
    return _options(dtype) | {
        "FACTOR": FACTORS[dtype],
        "WIDTH": _tiles(d, block) * block,
        "BLOCK_D": block,
        "BLOCK_E": _block(e, dtype.itemsize),
        "BLOCK_N": 32 if d <= block else 16,
        "QUERIES": QUERIES,
    }


def _jacobian_options(dtype: torch.dtype, d: int, e: int) -> dict[str, Any]:
    block = _block(d, dtype.itemsize)
    return _options(dtype) | {
        "WIDTH": _tiles(d, block) * block,
        "BLOCK_D": block,
        "BLOCK_E": _block(e, dtype.itemsize),
        "BLOCK_N": 32 if dtype.itemsize == 2 else 16,  # 32 of float32 spill on sm_80
    }


def _grad_options(dtype: torch.dtype, d: int, e: int) -> dict[str, Any]:
    block_d, block_e = _block(d, dtype.itemsize), _block(e, dtype.itemsize)
    return _options(dtype) | {
        "FACTOR": FACTORS[dtype],
        "WIDTH_D": _tiles(d, block_d) * block_d,
        "WIDTH_E": _tiles(e, block_e) * block_e,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "BLOCK_N": 16,  # 32 spill
        "QUERIES": QUERIES,
    }


def _for_float64(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask in float64 if that is q's: Triton does not compile bfloat16 to float64."""
    return mask if mask is None or q.dtype != torch.float64 else mask.double()


def _arguments(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple:
    """scale, sizes and strides, as all kernels take them."""
    batch, heads, n, d = k.shape
    q = q.expand(batch, -1, -1, -1)
    mask_strides = (0, 0, 0) if mask is None else mask.expand(batch, heads, -1).stride()
    sizes = (heads, q.shape[2], n, d, v.shape[3])
    return (scale, *sizes, q.stride(), k.stride(), v.stride(), mask_strides)


def query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, jacobian: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, e] and J [B, H, T, d, e] in the dtype ``jacobian``, [0] for None."""
    check_devices("query_attention", q=q, k=k, v=v, mask=mask)
    _check_query_attention("query_attention", q, k, v, mask)
    torch._check_type(
        jacobian is None or jacobian in FLOATING,
        lambda: f"query_attention: jacobian must be floating point, got {jacobian}",
    )
    batch, heads, _, d = k.shape
    t, e = q.shape[2], v.shape[3]
    out = q.new_empty((batch, heads, t, e))
    shape = (0,) if jacobian is None else (batch, heads, t, d, e)
    j = q.new_empty(shape, dtype=jacobian)
    mask = _for_float64(mask, q)
    arguments = _arguments(q, k, v, mask, scale)
    if not out.numel():
        return out, j
    with torch.cuda.device_of(q):
        if jacobian is None:
            options = _out_options(q.dtype, d, e)
            programs = batch * heads * triton.cdiv(t, QUERIES)
            grid: tuple[int, ...] = (programs, _tiles(e, options["BLOCK_E"]))
            _out_kernel[grid](q, k, v, mask, out, *arguments, **options)
        else:
            options = _jacobian_options(q.dtype, d, e)
            tiles = _tiles(d, options["BLOCK_D"]), _tiles(e, options["BLOCK_E"])
            grid = (batch * heads * t, *tiles)
            _jacobian_kernel[grid](q, k, v, mask, out, j, *arguments, **options)
    return out, j


def query_attention_grad(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """dq [B, H, T, d] of every sample, in the dtype of q."""
    check_devices("query_attention_grad", grad_out=grad_out, q=q, k=k, v=v, mask=mask)
    _check_query_attention("query_attention_grad", q, k, v, mask)
    batch, heads, _, d = k.shape
    t, e = q.shape[2], v.shape[3]
    torch._check(
        grad_out.shape == (batch, heads, t, e) and grad_out.dtype == q.dtype,
        lambda: (
            f"query_attention_grad: expected grad_out {(batch, heads, t, e)} {q.dtype}, got "
            f"{tuple(grad_out.shape)} {grad_out.dtype}"
        ),
    )
    grad = q.new_empty((batch, heads, t, d))
    mask = _for_float64(mask, q)
    if grad.numel():
        with torch.cuda.device_of(q):
            options = _grad_options(q.dtype, d, e)
            grid = (batch * heads * triton.cdiv(t, QUERIES), _tiles(d, options["BLOCK_D"]))
            _grad_kernel[grid](
                grad_out,
                q,
                k,
                v,
                mask,
                grad,
                grad_out.stride(),
                *_arguments(q, k, v, mask, scale),
                **options,
            )
    return grad
