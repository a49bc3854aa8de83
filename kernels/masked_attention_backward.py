"""Backward of masked_attention, into a gradient of qkv's own layout.

The probabilities are computed again from qkv and the log-sum-exp. Where one program can hold all keys of a head, one
kernel writes all three gradients; else one goes over the keys for each block of queries, and one the other way round.
Each gradient is written once, by one program: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from titok.kernels import _tuning
from titok.kernels._aot import AotVariant
from titok.kernels._tuning import Tile
from titok.kernels.masked_attention import (
    DTYPES,
    LOG2_E,
    OTHERS,
    PRESETS,
    constants_of,
    load_rows,
    masked_scores,
    store_rows,
    tuning_key,
    variant,
    visible_keys,
    whole_tile,
)


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
def masked_attention_backward_keys(
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
    k = load_rows(k_ptr, keys, tokens, stride_qkvn, bounded, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, keys, tokens, stride_qkvn, bounded, HEAD_DIM, BLOCK_D)
    visible = visible_keys(key_mask_ptr, keys, tokens)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    HIDES: tl.constexpr = key_mask_ptr is not None or (FUSED and TAIL == 0)
    if TAIL > 0:
        tail_keys = BLOCK_N + tl.arange(0, TAIL)
        tail_k = load_rows(k_ptr, tail_keys, tokens, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        tail_v = load_rows(v_ptr, tail_keys, tokens, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        tail_visible = visible_keys(key_mask_ptr, tail_keys, tokens)
        tail_dk = tl.zeros([TAIL, BLOCK_D], tl.float32)
        tail_dv = tl.zeros([TAIL, BLOCK_D], tl.float32)
    for first in range(0, queries, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, queries, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        do = load_rows(grad_ptr, rows, queries, width, True, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf"))
        if FUSED:
            out = load_rows(out_ptr, rows, queries, width, True, HEAD_DIM, BLOCK_D)
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
            store_rows(dq_ptr, dq * scale, rows, queries, 3 * width, HEAD_DIM, BLOCK_D)
    store_rows(dk_ptr, dk * scale, keys, tokens, 3 * width, HEAD_DIM, BLOCK_D)
    store_rows(dk_ptr + width, dv, keys, tokens, 3 * width, HEAD_DIM, BLOCK_D)
    if TAIL > 0:
        store_rows(dk_ptr, tail_dk * scale, tail_keys, tokens, 3 * width, HEAD_DIM, BLOCK_D)
        store_rows(dk_ptr + width, tail_dv, tail_keys, tokens, 3 * width, HEAD_DIM, BLOCK_D)


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
    k = load_rows(k_ptr, keys, tokens, stride, IS_TAIL, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, keys, tokens, stride, IS_TAIL, HEAD_DIM, BLOCK_D)
    s = masked_scores(q, k, visible_keys(key_mask_ptr, keys, tokens), scale_log2, HIDES, PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "start", "queries"])
def masked_attention_backward_queries(
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
    q = load_rows(q_ptr, rows, queries, stride_qkvn, True, HEAD_DIM, BLOCK_D)
    do = load_rows(grad_ptr, rows, queries, width, True, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, rows, queries, width, True, HEAD_DIM, BLOCK_D)
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
    store_rows(dq_ptr, dq * scale, rows, queries, 3 * width, HEAD_DIM, BLOCK_D)


def _plan(dtype: torch.dtype, head_dim: int, tokens: int) -> list[tuple[Any, dict[str, Any], Tile]]:
    """Kernel, constants and tile of each launch, in order."""
    key = tuning_key(dtype, head_dim)
    if tile := whole_tile(_tuning.MASKED_ATTENTION_BACKWARD_WHOLE[key], tokens):
        return [
            (masked_attention_backward_keys, constants_of(tile, dtype, head_dim, tokens) | {"FUSED": True}, tile)
        ]
    queries, keys = _tuning.MASKED_ATTENTION_BACKWARD_QUERIES[key], _tuning.MASKED_ATTENTION_BACKWARD_KEYS[key]
    of_keys = constants_of(keys, dtype, head_dim, tokens) | {"FUSED": False, "TAIL": 0}
    return [
        (masked_attention_backward_queries, constants_of(queries, dtype, head_dim, tokens), queries),
        (masked_attention_backward_keys, of_keys, keys),
    ]


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
    plan = _plan(qkv.dtype, width // (3 * num_heads), tokens)
    delta = None if len(plan) == 1 else torch.empty_like(lse)
    for kernel, constants, tile in plan:
        blocks = triton.cdiv(queries, tile.rows)
        if kernel is masked_attention_backward_keys:
            blocks = 1 if constants["FUSED"] else triton.cdiv(tokens, tile.columns)
        kernel[(blocks * batch * num_heads,)](
            qkv, key_mask, out, lse, delta, grad, dqkv, qkv.stride(0), qkv.stride(1), num_heads, tokens, start,
            queries, scale, scale * LOG2_E, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def aot_variants() -> list[AotVariant]:
    shapes = [(dtype, *shape) for dtype in DTYPES for shape in PRESETS + OTHERS]
    return [
        variant(*shape, *launch)
        for shape in shapes
        for launch in _plan(*shape[:3])
        # the one that is known to spill, and why: _tuning.py
        if not (launch[0] is masked_attention_backward_queries and shape[0] == torch.float32 and shape[1] > 64)
    ]
