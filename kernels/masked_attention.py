"""Attention from (B, N, 3*H*D), as the linear layer wrote it, to (B, Nq, H*D), as the next one reads it.

Token counts here are a power of two and a few: 33, 65, 129, 289. Keys therefore come as full blocks, which need no
bounds, and one tail of a narrower power of two: 65 = 64 + 16 wide, not 128. Where they are few, a program holds
all scores of its queries and takes one softmax; else it goes over the blocks with a running maximum
(Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). The backward rebuilds the probabilities from the
log-sum-exp. Each gradient is written once by one program: no atomics, the same bits every time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from titok.kernels import _tuning
from titok.kernels._aot import AotVariant
from titok.kernels._tuning import Tile

LOG2_E = math.log2(math.e)


# --- tiles


@triton.jit
def _load_rows(ptr, rows, row_count, stride, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, (len(rows), BLOCK_D); 0 past HEAD_DIM and, where MASKED, past row_count."""
    columns = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(ptrs, mask=(rows[:, None] < row_count) & (columns[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=columns[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def _store_rows(ptr, tile, rows, row_count, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < row_count) & (columns[None, :] < HEAD_DIM)
    tl.store(ptr + rows[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _visible(key_mask_ptr, keys, tokens):
    """Which of these keys exist and may be seen."""
    inside = keys < tokens
    if key_mask_ptr is not None:
        inside = inside & (tl.load(key_mask_ptr + keys, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _scores(q, k, visible, scale_log2, HIDES: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in units of log2, -inf where the key is hidden. (BLOCK_M, BLOCK_N)"""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if HIDES:
        s = tl.where(visible[None, :], s, -float("inf"))
    return s


# --- forward


@triton.jit
def _write_output(
    acc, m, total, out_ptr, lse_ptr, rows, queries, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """acc / total, and the log-sum-exp in units of log2; a row that sees no key has total 0: it gives 0 and +inf."""
    blind = total == 0
    out = acc / tl.where(blind, 1.0, total)[:, None]
    _store_rows(out_ptr, out, rows, queries, stride, HEAD_DIM, BLOCK_D)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, tl.where(blind, float("inf"), m + tl.log2(total)), mask=rows < queries)


@triton.jit(do_not_specialize=["tokens", "start", "queries"])
def _forward_one_block(
    qkv_ptr,
    key_mask_ptr,  # (B, N) or None
    out_ptr,  # (B, Nq, H*D)
    lse_ptr,  # (B, H, Nq) or None
    stride_qkvb,
    stride_qkvn,
    num_heads,
    tokens,
    start,
    queries,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, all keys (BLOCK_N + TAIL of them) at once."""
    blocks = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // blocks
    b = (head // num_heads).to(tl.int64)
    h = head % num_heads
    width = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + b * stride_qkvb + h * HEAD_DIM
    k_ptr = q_ptr + width
    v_ptr = k_ptr + width
    if key_mask_ptr is not None:
        key_mask_ptr += b * tokens
    HIDES: tl.constexpr = key_mask_ptr is not None or TAIL == 0

    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    q = _load_rows(q_ptr + start * stride_qkvn, rows, queries, stride_qkvn, True, HEAD_DIM, BLOCK_D)
    k = _load_rows(k_ptr, keys, tokens, stride_qkvn, TAIL == 0, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_ptr, keys, tokens, stride_qkvn, TAIL == 0, HEAD_DIM, BLOCK_D)
    s = _scores(q, k, _visible(key_mask_ptr, keys, tokens), scale_log2, HIDES, PRECISION)
    m = tl.max(s, 1)
    if TAIL > 0:
        tail_keys = BLOCK_N + tl.arange(0, TAIL)
        tail_k = _load_rows(k_ptr, tail_keys, tokens, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        tail_v = _load_rows(v_ptr, tail_keys, tokens, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        tail_s = _scores(q, tail_k, _visible(key_mask_ptr, tail_keys, tokens), scale_log2, True, PRECISION)
        m = tl.maximum(m, tl.max(tail_s, 1))
    m = tl.where(m == -float("inf"), 0.0, m)  # a row that sees no key: exp2(-inf - 0) = 0, not NaN
    p = tl.exp2(s - m[:, None])
    total = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    if TAIL > 0:
        tail_p = tl.exp2(tail_s - m[:, None])
        total += tl.sum(tail_p, 1)
        acc = tl.dot(tail_p.to(v.dtype), tail_v, acc, input_precision=PRECISION)
    if lse_ptr is not None:
        lse_ptr += head.to(tl.int64) * queries
    out_ptr += b * queries * width + h * HEAD_DIM
    _write_output(acc, m, total, out_ptr, lse_ptr, rows, queries, width, HEAD_DIM, BLOCK_D)


@triton.jit
def _online_step(
    acc,
    m,
    total,
    q,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    keys,
    tokens,
    stride,
    scale_log2,
    IS_TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes one block of keys into the running maximum m, sum l and weighted sum of values acc."""
    HIDES: tl.constexpr = key_mask_ptr is not None or IS_TAIL
    k = _load_rows(k_ptr, keys, tokens, stride, IS_TAIL, HEAD_DIM, BLOCK_D)
    s = _scores(q, k, _visible(key_mask_ptr, keys, tokens), scale_log2, HIDES, PRECISION)
    new_m = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(new_m == -float("inf"), 0.0, new_m)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    v = _load_rows(v_ptr, keys, tokens, stride, IS_TAIL, HEAD_DIM, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, new_m, total * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=["tokens", "start", "queries"])
def _forward_tiled(
    qkv_ptr,
    key_mask_ptr,
    out_ptr,
    lse_ptr,
    stride_qkvb,
    stride_qkvn,
    num_heads,
    tokens,
    start,
    queries,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, over the keys in full blocks and then their tail."""
    blocks = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // blocks
    b = (head // num_heads).to(tl.int64)
    h = head % num_heads
    width = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + b * stride_qkvb + h * HEAD_DIM
    k_ptr = q_ptr + width
    v_ptr = k_ptr + width
    if key_mask_ptr is not None:
        key_mask_ptr += b * tokens

    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr + start * stride_qkvn, rows, queries, stride_qkvn, True, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tokens // BLOCK_N * BLOCK_N
    for first in range(0, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        acc, m, total = _online_step(
            acc, m, total, q, k_ptr, v_ptr, key_mask_ptr, keys, tokens, stride_qkvn, scale_log2, False,
            HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        keys = end + tl.arange(0, TAIL)
        acc, m, total = _online_step(
            acc, m, total, q, k_ptr, v_ptr, key_mask_ptr, keys, tokens, stride_qkvn, scale_log2, True,
            HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    if lse_ptr is not None:
        lse_ptr += head.to(tl.int64) * queries
    out_ptr += b * queries * width + h * HEAD_DIM
    _write_output(acc, m, total, out_ptr, lse_ptr, rows, queries, width, HEAD_DIM, BLOCK_D)


# --- backward


@triton.jit
def _key_gradients(
    dk, dv, k, v, visible, q, do, lse, delta, scale_log2, HIDES: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds what these queries give to the gradients of these keys and values; also returns the gradient of
    the scores. Keys are the rows of each product, so that its height is that of the key block."""
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
    if HIDES:
        p = tl.where(visible[:, None], p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv, ds


@triton.jit(do_not_specialize=["tokens", "start", "queries"])
def _backward_keys(
    qkv_ptr,
    key_mask_ptr,
    out_ptr,  # (B, Nq, H*D), read where FUSED
    lse_ptr,  # (B, H, Nq)
    delta_ptr,  # (B, H, Nq), read where not FUSED, else None
    grad_ptr,  # (B, Nq, H*D)
    dqkv_ptr,  # (B, N, 3*H*D)
    stride_qkvb,
    stride_qkvn,
    num_heads,
    tokens,
    start,
    queries,
    scale,
    scale_log2,
    FUSED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of BLOCK_N keys and values of one head, over all queries.

    FUSED: the program holds all keys (BLOCK_N + TAIL), and so has each query's whole gradient too.
    """
    blocks = 1 if FUSED else tl.cdiv(tokens, BLOCK_N)
    head = tl.program_id(0) // blocks
    b = (head // num_heads).to(tl.int64)
    h = head % num_heads
    width = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + b * stride_qkvb + h * HEAD_DIM
    k_ptr = q_ptr + width
    v_ptr = k_ptr + width
    if key_mask_ptr is not None:
        key_mask_ptr += b * tokens
    q_ptr += start * stride_qkvn
    out_ptr += b * queries * width + h * HEAD_DIM
    grad_ptr += b * queries * width + h * HEAD_DIM
    lse_ptr += head.to(tl.int64) * queries
    dk_ptr = dqkv_ptr + b * tokens * (3 * width) + width + h * HEAD_DIM

    keys = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    bounded: tl.constexpr = TAIL == 0
    k = _load_rows(k_ptr, keys, tokens, stride_qkvn, bounded, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_ptr, keys, tokens, stride_qkvn, bounded, HEAD_DIM, BLOCK_D)
    visible = _visible(key_mask_ptr, keys, tokens)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    HIDES: tl.constexpr = key_mask_ptr is not None or (FUSED and TAIL == 0)
    if TAIL > 0:
        tail_keys = BLOCK_N + tl.arange(0, TAIL)
        tail_k = _load_rows(k_ptr, tail_keys, tokens, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        tail_v = _load_rows(v_ptr, tail_keys, tokens, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        tail_visible = _visible(key_mask_ptr, tail_keys, tokens)
        tail_dk = tl.zeros([TAIL, BLOCK_D], tl.float32)
        tail_dv = tl.zeros([TAIL, BLOCK_D], tl.float32)
    for first in range(0, queries, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr, rows, queries, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        do = _load_rows(grad_ptr, rows, queries, width, True, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf"))
        if FUSED:
            out = _load_rows(out_ptr, rows, queries, width, True, HEAD_DIM, BLOCK_D)
            delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + head.to(tl.int64) * queries + rows, mask=rows < queries, other=0.0)
        dk, dv, ds = _key_gradients(dk, dv, k, v, visible, q, do, lse, delta, scale_log2, HIDES, PRECISION)
        if FUSED:
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
            if TAIL > 0:
                tail_dk, tail_dv, tail_ds = _key_gradients(
                    tail_dk, tail_dv, tail_k, tail_v, tail_visible, q, do, lse, delta, scale_log2, True, PRECISION
                )
                dq = tl.dot(tl.trans(tail_ds), tail_k, dq, input_precision=PRECISION)
            dq_ptr = dk_ptr - width + start * (3 * width)
            _store_rows(dq_ptr, dq * scale, rows, queries, 3 * width, HEAD_DIM, BLOCK_D)
    _store_rows(dk_ptr, dk * scale, keys, tokens, 3 * width, HEAD_DIM, BLOCK_D)
    _store_rows(dk_ptr + width, dv, keys, tokens, 3 * width, HEAD_DIM, BLOCK_D)
    if TAIL > 0:
        _store_rows(dk_ptr, tail_dk * scale, tail_keys, tokens, 3 * width, HEAD_DIM, BLOCK_D)
        _store_rows(dk_ptr + width, tail_dv, tail_keys, tokens, 3 * width, HEAD_DIM, BLOCK_D)


@triton.jit
def _query_gradient_step(
    dq,
    q,
    do,
    lse,
    delta,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    keys,
    tokens,
    stride,
    scale_log2,
    IS_TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    HIDES: tl.constexpr = key_mask_ptr is not None or IS_TAIL
    k = _load_rows(k_ptr, keys, tokens, stride, IS_TAIL, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_ptr, keys, tokens, stride, IS_TAIL, HEAD_DIM, BLOCK_D)
    s = _scores(q, k, _visible(key_mask_ptr, keys, tokens), scale_log2, HIDES, PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "start", "queries"])
def _backward_queries(
    qkv_ptr,
    key_mask_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,  # (B, H, Nq), written: sum over D of out * grad
    grad_ptr,
    dqkv_ptr,
    stride_qkvb,
    stride_qkvn,
    num_heads,
    tokens,
    start,
    queries,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of BLOCK_M queries of one head, over all keys."""
    blocks = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // blocks
    b = (head // num_heads).to(tl.int64)
    h = head % num_heads
    width = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + b * stride_qkvb + h * HEAD_DIM
    k_ptr = q_ptr + width
    v_ptr = k_ptr + width
    if key_mask_ptr is not None:
        key_mask_ptr += b * tokens
    q_ptr += start * stride_qkvn
    out_ptr += b * queries * width + h * HEAD_DIM
    grad_ptr += b * queries * width + h * HEAD_DIM
    lse_ptr += head.to(tl.int64) * queries
    delta_ptr += head.to(tl.int64) * queries
    dq_ptr = dqkv_ptr + (b * tokens + start) * (3 * width) + h * HEAD_DIM

    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, rows, queries, stride_qkvn, True, HEAD_DIM, BLOCK_D)
    do = _load_rows(grad_ptr, rows, queries, width, True, HEAD_DIM, BLOCK_D)
    out = _load_rows(out_ptr, rows, queries, width, True, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=rows < queries)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tokens // BLOCK_N * BLOCK_N
    for first in range(0, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        dq = _query_gradient_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, key_mask_ptr, keys, tokens, stride_qkvn, scale_log2, False,
            HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        keys = end + tl.arange(0, TAIL)
        dq = _query_gradient_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, key_mask_ptr, keys, tokens, stride_qkvn, scale_log2, True,
            HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    _store_rows(dq_ptr, dq * scale, rows, queries, 3 * width, HEAD_DIM, BLOCK_D)


# --- launchers


def _width(tokens: int) -> tuple[int, int]:
    """(BLOCK_N, TAIL), the narrowest pair of powers of two, or one alone, that holds this many keys."""
    whole = max(16, triton.next_power_of_2(tokens))
    half = whole // 2
    if half < 16 or tokens <= half:
        return whole, 0
    tail = max(16, triton.next_power_of_2(tokens - half))
    return (half, tail) if tail < half else (whole, 0)


def _key(dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
    return dtype.itemsize, max(64, triton.next_power_of_2(head_dim))


def _constants(tile: Tile, dtype: torch.dtype, head_dim: int, tokens: int) -> dict[str, Any]:
    block_n, tail = tile.columns, 0
    if block_n == 0:
        block_n, tail = _width(tokens)
    elif tokens % block_n:
        tail = max(16, triton.next_power_of_2(tokens % block_n))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.rows,
        "BLOCK_N": block_n,
        "TAIL": tail,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        # three tf32 products that make up for each other's rounding: float32's accuracy on tensor cores
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }


def _whole(tiles: tuple[tuple[int, Tile], ...], tokens: int) -> Tile | None:
    """The tile of a kernel whose programs hold all keys; None where there are too many."""
    return next((tile for most, tile in tiles if sum(_width(tokens)) <= most), None)


def _forward_plan(dtype: torch.dtype, head_dim: int, tokens: int) -> tuple[Any, dict[str, Any], Tile]:
    """Kernel, constants and tile."""
    key = _key(dtype, head_dim)
    if tile := _whole(_tuning.MASKED_ATTENTION_FORWARD_WHOLE[key], tokens):
        return _forward_one_block, _constants(tile, dtype, head_dim, tokens), tile
    tile = _tuning.MASKED_ATTENTION_FORWARD[key]
    return _forward_tiled, _constants(tile, dtype, head_dim, tokens), tile


def _backward_plan(dtype: torch.dtype, head_dim: int, tokens: int) -> list[tuple[Any, dict[str, Any], Tile]]:
    """Kernel, constants and tile of each launch, in order."""
    key = _key(dtype, head_dim)
    if tile := _whole(_tuning.MASKED_ATTENTION_BACKWARD_WHOLE[key], tokens):
        return [(_backward_keys, _constants(tile, dtype, head_dim, tokens) | {"FUSED": True}, tile)]
    queries, keys = _tuning.MASKED_ATTENTION_BACKWARD_QUERIES[key], _tuning.MASKED_ATTENTION_BACKWARD_KEYS[key]
    of_keys = _constants(keys, dtype, head_dim, tokens) | {"FUSED": False, "TAIL": 0}
    return [
        (_backward_queries, _constants(queries, dtype, head_dim, tokens), queries),
        (_backward_keys, of_keys, keys),
    ]


def forward(
    qkv: torch.Tensor,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    num_heads: int,
    start: int,
    scale: float,
) -> None:
    """Fills out (B, Nq, H*D) and, where given, lse (B, H, Nq) float32, in units of log2, for queries from `start`.

    qkv: (B, N, 3*H*D) with a last stride of 1 and offsets within a sample below 2^31; key_mask contiguous.
    """
    batch, tokens, width = qkv.shape
    queries = out.shape[1]
    kernel, constants, tile = _forward_plan(qkv.dtype, width // (3 * num_heads), tokens)
    kernel[(triton.cdiv(queries, tile.rows) * batch * num_heads,)](
        qkv, key_mask, out, lse, qkv.stride(0), qkv.stride(1), num_heads, tokens, start, queries, scale * LOG2_E,
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dqkv: torch.Tensor,
    num_heads: int,
    start: int,
    scale: float,
) -> None:
    """Fills dqkv (B, N, 3*H*D), but for the rows of queries outside start..start+Nq. All but qkv contiguous."""
    batch, tokens, width = qkv.shape
    queries = out.shape[1]
    plan = _backward_plan(qkv.dtype, width // (3 * num_heads), tokens)
    delta = None if len(plan) == 1 else torch.empty_like(lse)
    for kernel, constants, tile in plan:
        blocks = triton.cdiv(queries, tile.rows)
        if kernel is _backward_keys:
            blocks = 1 if constants["FUSED"] else triton.cdiv(tokens, tile.columns)
        kernel[(blocks * batch * num_heads,)](
            qkv, key_mask, out, lse, delta, grad, dqkv, qkv.stride(0), qkv.stride(1), num_heads, tokens, start,
            queries, scale, scale * LOG2_E, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def aot_variants() -> list[AotVariant]:
    """The presets' shapes, forward and backward, in bf16 and fp32; both forms with a key mask; the widest heads."""
    shapes = [(d, n, False) for d in (48, 64) for n in (33, 65, 129)]  # generators: one condition and K codes
    shapes += [(64, n, False) for n in (289, 321, 385)]  # tokenizers: patches, the class token and K latents
    shapes += [
        (64, 33, True),
        (64, 129, True),
        (64, 289, True),
        (72, 321, False),
        (128, 65, False),
        (128, 321, False),
    ]
    return [
        _variant(dtype, head_dim, tokens, masked, *launch)
        for dtype in (torch.bfloat16, torch.float32)
        for head_dim, tokens, masked in shapes
        for launch in (
            _forward_plan(dtype, head_dim, tokens),
            *_backward_plan(dtype, head_dim, tokens),
        )
    ]


def _variant(
    dtype: torch.dtype,
    head_dim: int,
    tokens: int,
    masked: bool,
    kernel: Any,
    constants: dict[str, Any],
    tile: Tile,
) -> AotVariant:
    element = "bf16" if dtype == torch.bfloat16 else "fp32"
    constants = dict(constants) if masked else {**constants, "key_mask_ptr": None}
    if constants.get("FUSED"):
        constants["delta_ptr"] = None
    types = {
        "key_mask_ptr": "*i1",
        "lse_ptr": "*fp32",
        "delta_ptr": "*fp32",
        "scale": "fp32",
        "scale_log2": "fp32",
    }
    types |= dict.fromkeys(("qkv_ptr", "out_ptr", "grad_ptr", "dqkv_ptr"), f"*{element}")
    types |= dict.fromkeys(("stride_qkvb", "stride_qkvn", "num_heads", "tokens", "start", "queries"), "i32")
    signature = {name: types[name] for name in kernel.arg_names if name in types and name not in constants}
    label = f"{element} D={head_dim} N={tokens}{' key_mask' if masked else ''}"
    return AotVariant(kernel, signature, constants, tile.num_warps, tile.num_stages, label, True)
