"""Attention's gradient from q, k, v and grad_out alone, in Triton.

With p = softmax(scale q k^T) by row, g = grad_out v^T and delta = sum over keys of p g,

    ds = p (g - delta),    dq = scale ds k,    dk = scale ds^T q,    dv = p^T grad_out.

Delta is summed up with the row's sum of exponentials, online, so the output is neither kept nor
made again: of the forward's two products one is left.

``_queries_kernel``  A program takes BLOCK_M queries of a head and reads the keys and values in
                     blocks, twice: for the logarithm of the row's sum and for delta, which it
                     stores, and then for dq. Where the keys fit in one block, once.
``_keys_kernel``     A program takes BLOCK_N keys and reads the queries in blocks, for dk and dv.

Every result has one writer: there are no atomics, and equal arguments give equal bits. Bound by
the products of the tensor cores, 9 or 7 of Nq Nk d multiplications, and by exp. Sums, p, g and ds
are in float32; p and ds are rounded to the operands' dtype for their products, as torch's own
kernels round them. A product of float32 is three in tf32, as theirs are.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memtl._attention import attention_grad as run_again

from .common import check_devices

WIDEST = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}
"""Features of a head, of which a program holds all: as many as the registers do."""

# Queries, keys, warps and stages of a program, such that no register spills and eight warps or more
# fit on a multiprocessor: by the features of a head, up to so many; by keys, for 64 features, where
# they are one block; and for float32.
QUERIES_TILES = {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 2)}
WHOLE_TILES = {64: (64, 64, 4, 1), 128: (64, 128, 8, 1), 256: (32, 256, 8, 1)}
KEYS_TILES = {64: (64, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)}
FLOAT32_TILES = (16, 32, 4, 2)


@triton.jit
def _read(ptr, batch, head, row, rows, strides, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """ptr[batch, head, row], BLOCK columns of it; zeros beyond the last row and column."""
    column = tl.arange(0, BLOCK)
    ptr += batch * strides[0] + head * strides[1]
    ptrs = ptr + row.to(tl.int64)[:, None] * strides[2] + column.to(tl.int64)[None, :] * strides[3]
    inside = (row < rows)[:, None]
    if WIDTH < BLOCK:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _write(ptr, x, head, row, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x to rows of ptr[head], contiguous and WIDTH columns wide."""
    column = tl.arange(0, BLOCK)
    ptrs = ptr + (head * rows + row)[:, None] * WIDTH + column[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, grad_out, k, v, to_log2, m, n, N, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of queries m and keys n for exp2, -inf where they do not meet; and g."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * to_log2
    allowed = (n < N)[None, :]
    if CAUSAL:
        allowed = allowed & (n[None, :] <= m[:, None])
    g = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    return tl.where(allowed, scores, float("-inf")), g


@triton.jit
def _queries_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    logs_ptr,
    deltas_ptr,
    scale,
    H,
    M,
    N,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, log2 of the sum of exponentials and delta, for BLOCK_M queries; WHOLE: N <= BLOCK_N."""
    tiles = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # of B H
    batch, head = row // H, row % H
    # Under CAUSAL the last queries read most: they go first.
    m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    to_log2 = scale * 1.4426950408889634  # exp is exp2 of that
    q = _read(q_ptr, batch, head, m, M, q_strides, D, BLOCK_D)
    grad_out = _read(grad_out_ptr, batch, head, m, M, grad_out_strides, E, BLOCK_E)
    if WHOLE:
        n = tl.arange(0, BLOCK_N)
        k = _read(k_ptr, batch, head, n, N, k_strides, D, BLOCK_D)
        v = _read(v_ptr, batch, head, n, N, v_strides, E, BLOCK_E)
        scores, g = _scores(q, grad_out, k, v, to_log2, m, n, N, CAUSAL, PRECISION)
        best = tl.max(scores, 1)
        p = tl.exp2(scores - best[:, None])
        total = tl.sum(p, 1)
        log = best + tl.log2(total)
        p /= total[:, None]
        delta = tl.sum(p * g, 1)
        ds = p * (g - delta[:, None])
        grad = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    else:
        end = tl.minimum(N, tl.max(m, 0) + 1) if CAUSAL else N
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            k = _read(k_ptr, batch, head, n, N, k_strides, D, BLOCK_D)
            v = _read(v_ptr, batch, head, n, N, v_strides, E, BLOCK_E)
            scores, g = _scores(q, grad_out, k, v, to_log2, m, n, N, CAUSAL, PRECISION)
            new = tl.maximum(best, tl.max(scores, 1))
            fade = tl.exp2(best - new)
            p = tl.exp2(scores - new[:, None])
            total = total * fade + tl.sum(p, 1)
            delta = delta * fade + tl.sum(p * g, 1)
            best = new
        log = best + tl.log2(total)
        delta /= total
        grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            k = _read(k_ptr, batch, head, n, N, k_strides, D, BLOCK_D)
            v = _read(v_ptr, batch, head, n, N, v_strides, E, BLOCK_E)
            scores, g = _scores(q, grad_out, k, v, to_log2, m, n, N, CAUSAL, PRECISION)
            ds = tl.exp2(scores - log[:, None]) * (g - delta[:, None])
            grad = tl.dot(ds.to(k.dtype), k, grad, input_precision=PRECISION)
    _write(grad_ptr, grad * scale, row, m, M, D, BLOCK_D)
    tl.store(logs_ptr + row * M + m, log, mask=m < M)
    tl.store(deltas_ptr + row * M + m, delta, mask=m < M)


@triton.jit
def _keys_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_k_ptr,
    grad_v_ptr,
    logs_ptr,
    deltas_ptr,
    scale,
    H,
    M,
    N,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BLOCK_N keys; tiles are [keys, queries], as the products want p and ds."""
    tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # of B H
    batch, head = row // H, row % H
    first = tl.program_id(0) % tiles * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    to_log2 = scale * 1.4426950408889634
    k = _read(k_ptr, batch, head, n, N, k_strides, D, BLOCK_D)
    v = _read(v_ptr, batch, head, n, N, v_strides, E, BLOCK_E)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(first // BLOCK_M * BLOCK_M if CAUSAL else 0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = _read(q_ptr, batch, head, m, M, q_strides, D, BLOCK_D)
        grad_out = _read(grad_out_ptr, batch, head, m, M, grad_out_strides, E, BLOCK_E)
        log = tl.load(logs_ptr + row * M + m, mask=m < M, other=float("inf"))
        delta = tl.load(deltas_ptr + row * M + m, mask=m < M, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * to_log2
        if CAUSAL:
            scores = tl.where(n[:, None] <= m[None, :], scores, float("-inf"))
        p = tl.exp2(scores - log[None, :])
        grad_v = tl.dot(p.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        g = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        ds = p * (g - delta[None, :])
        grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)
    _write(grad_k_ptr, grad_k * scale, row, n, N, D, BLOCK_D)
    _write(grad_v_ptr, grad_v, row, n, N, E, BLOCK_E)


def _options(dtype: torch.dtype, d: int, e: int, is_causal: bool, tiles: tuple) -> dict[str, Any]:
    """What a kernel is compiled with."""
    return {
        "D": d,
        "E": e,
        "BLOCK_D": _block(d),
        "BLOCK_E": _block(e),
        "BLOCK_M": tiles[0],
        "BLOCK_N": tiles[1],
        "CAUSAL": is_causal,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": tiles[2],
        "num_stages": tiles[3],
    }


def _block(width: int) -> int:
    """Columns of a tile: a power of two that a tensor core takes."""
    return max(triton.next_power_of_2(width), 16)


def _up_to(size: int, table: dict[int, tuple]) -> tuple:
    return table[min(most for most in table if size <= most)]


def _queries_options(dtype: torch.dtype, d: int, e: int, n: int, is_causal: bool) -> dict[str, Any]:
    whole = dtype != torch.float32 and max(d, e) <= 64 and n <= max(WHOLE_TILES)
    if dtype == torch.float32:
        tiles = FLOAT32_TILES
    else:
        tiles = _up_to(n, WHOLE_TILES) if whole else _up_to(max(d, e), QUERIES_TILES)
    return _options(dtype, d, e, is_causal, tiles) | {"WHOLE": whole}


def _keys_options(dtype: torch.dtype, d: int, e: int, is_causal: bool) -> dict[str, Any]:
    tiles = FLOAT32_TILES if dtype == torch.float32 else _up_to(max(d, e), KEYS_TILES)
    return _options(dtype, d, e, is_causal, tiles)


def _served(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> bool:
    """Whether the kernels take such operands: as many heads in all, and none empty; on a CPU no
    bfloat16, whose bits Triton's interpreter would multiply as integers."""
    tensors = (grad_out, q, k, v)
    return (
        (q.is_cuda or q.dtype != torch.bfloat16)
        and all(t.dim() == 4 and t.dtype == q.dtype and t.numel() > 0 for t in tensors)
        and all(t.shape[:2] == q.shape[:2] for t in tensors)
        and q.shape[3] == k.shape[3]
        and k.shape[2] == v.shape[2]
        and grad_out.shape[2:] == (q.shape[2], v.shape[3])
        and max(q.shape[3], v.shape[3]) <= WIDEST.get(q.dtype, 0)
    )


def attention_grad(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, and an empty tensor; torch's own attention is run again for what the
    kernels have no case of: a mask, dropout, fewer key heads, float64, wide heads."""
    check_devices("attention_grad", grad_out=grad_out, q=q, k=k, v=v, mask=mask)
    if mask is not None or dropout_p > 0 or not _served(q, k, v, grad_out):
        return run_again(
            grad_out, q, k, v, mask, dropout_p, rng_state, is_causal, scale, enable_gqa, mask_grad
        )
    batch, heads, queries, d = q.shape
    keys, e = v.shape[2:]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    logs, deltas = q.new_empty((2, batch, heads, queries), dtype=torch.float32)
    scale = 1 / math.sqrt(d) if scale is None else scale
    strides = (t.stride() for t in (grad_out, q, k, v))
    arguments = (logs, deltas, scale, heads, queries, keys, *strides)
    with torch.cuda.device_of(q):
        options = _queries_options(q.dtype, d, e, keys, is_causal)
        grid = (batch * heads * triton.cdiv(queries, options["BLOCK_M"]),)
        _queries_kernel[grid](grad_out, q, k, v, dq, *arguments, **options)
        options = _keys_options(q.dtype, d, e, is_causal)
        grid = (batch * heads * triton.cdiv(keys, options["BLOCK_N"]),)
        _keys_kernel[grid](grad_out, q, k, v, dk, dv, *arguments, **options)
    return dq, dk, dv, q.new_empty((0,))
