"""Backward of masked_attention: from grad (B, Nq, H*D) to dqkv (B, N, 3*H*D), the gradient in qkv's own layout.

With S = scale * Q K^T, P = softmax(S), O = P V for one head, and dO the gradient of O (FlashAttention-2, Dao 2023,
arXiv:2307.08691, section 3.1):

    delta = sum over D of O * dO            dV = P^T dO
    dP = dO V^T                             dQ = scale * dS K
    dS = P * (dP - delta)                   dK = scale * dS^T Q

P is computed again from qkv and the log-sum-exp. Where one program can hold all keys of a head, a single kernel writes
all three gradients. Otherwise one kernel takes BLOCK_M queries per program and walks over the keys, and another takes
BLOCK_N keys per program and walks over the queries:

                            keys ->
                         +-----+-----+-----+
              queries    |     |  |  |     |     masked_attention_backward_queries: -> along a row, writes dQ and delta
                         | ->  |  v  |     |     masked_attention_backward_keys:    v  down a column, writes dK and dV
                         +-----+-----+-----+

Every gradient is written once, by one program: no atomics, the same bits in every run. The rounding of keys to
BLOCK_N + TAIL, the layout of qkv and the units of log2 are those of `masked_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta
from titok.kernels._launch import launch, record
from titok.kernels._tuning import (
    MASKED_ATTENTION_BACKWARD_KEYS,
    MASKED_ATTENTION_BACKWARD_QUERIES,
    MASKED_ATTENTION_BACKWARD_WHOLE,
)
from titok.kernels.masked_attention import (
    AOT_DTYPES,
    AOT_SHAPES,
    LOG2_E,
    aot_label,
    constexprs_of,
    load_rows,
    locate_head,
    masked_scores,
    store_rows,
    tuning_key,
    visible_keys,
    whole_tile,
)


@triton.jit
def _key_gradients(
    dk, dv, k, v, visible, q, do, lse, delta, scale_log2, HAS_HIDDEN_KEYS: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds what some queries contribute to dK (not yet scaled) and dV of some keys; also returns dS^T.

    Keys are the rows of every product, so that its height is the number of keys.
    """
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
    if HAS_HIDDEN_KEYS:
        p = tl.where(visible[:, None], p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv, ds


@triton.jit(do_not_specialize=["N", "start", "NQ"])
def masked_attention_backward_keys(
    grad_ptr,  # (B, NQ, H*D)
    qkv_ptr,  # (B, N, 3*H*D)
    key_mask_ptr,  # (B, N) bool or None
    out_ptr,  # (B, NQ, H*D), result of the forward pass; None with delta
    lse_ptr,  # (B, H, NQ) float32, from the forward pass
    delta_ptr,  # (B, H, NQ) float32, from masked_attention_backward_queries; None if ALL_KEYS
    dqkv_ptr,  # (B, N, 3*H*D), written: k and v, and if ALL_KEYS the rows of q that are queries
    stride_qkvb,
    stride_qkvn,
    H,
    N,
    start,
    NQ,
    scale,
    scale_log2,  # scale * log2(e)
    ALL_KEYS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dK and dV of BLOCK_N keys of one head, over all queries in blocks of BLOCK_M.

    ALL_KEYS: the program holds every key of the head (BLOCK_N + TAIL), and so computes dQ as well.
    """
    blocks = 1 if ALL_KEYS else tl.cdiv(N, BLOCK_N)
    sample, head, position, q_ptr, k_ptr, v_ptr = locate_head(qkv_ptr, stride_qkvb, H, blocks, D)
    width = H * D
    if key_mask_ptr is not None:
        key_mask_ptr += sample * N
    q_ptr += start * stride_qkvn
    grad_ptr += sample * NQ * width + head * D
    if ALL_KEYS:
        out_ptr += sample * NQ * width + head * D
    else:
        delta_ptr += position * NQ
    lse_ptr += position * NQ
    dk_ptr = dqkv_ptr + sample * N * (3 * width) + width + head * D

    keys = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    bounded: tl.constexpr = TAIL == 0
    k = load_rows(k_ptr, keys, N, stride_qkvn, bounded, D, BLOCK_D)
    v = load_rows(v_ptr, keys, N, stride_qkvn, bounded, D, BLOCK_D)
    visible = visible_keys(key_mask_ptr, keys, N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Keys past N load as 0 and are not stored: they disturb only dQ, which sums over keys.
    HAS_HIDDEN_KEYS: tl.constexpr = key_mask_ptr is not None or (ALL_KEYS and TAIL == 0)
    if TAIL > 0:
        tail_keys = BLOCK_N + tl.arange(0, TAIL)
        tail_k = load_rows(k_ptr, tail_keys, N, stride_qkvn, True, D, BLOCK_D)
        tail_v = load_rows(v_ptr, tail_keys, N, stride_qkvn, True, D, BLOCK_D)
        tail_visible = visible_keys(key_mask_ptr, tail_keys, N)
        tail_dk = tl.zeros([TAIL, BLOCK_D], tl.float32)
        tail_dv = tl.zeros([TAIL, BLOCK_D], tl.float32)
    for first in range(0, NQ, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, NQ, stride_qkvn, True, D, BLOCK_D)
        do = load_rows(grad_ptr, rows, NQ, width, True, D, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < NQ, other=float("inf"))  # makes p 0 past the last query
        if ALL_KEYS:
            out = load_rows(out_ptr, rows, NQ, width, True, D, BLOCK_D)
            delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + rows, mask=rows < NQ, other=0.0)
        dk, dv, ds = _key_gradients(
            dk, dv, k, v, visible, q, do, lse, delta, scale_log2, HAS_HIDDEN_KEYS, PRECISION
        )
        if ALL_KEYS:
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
            if TAIL > 0:
                tail_dk, tail_dv, tail_ds = _key_gradients(
                    tail_dk, tail_dv, tail_k, tail_v, tail_visible, q, do, lse, delta, scale_log2, True, PRECISION
                )
                dq = tl.dot(tl.trans(tail_ds), tail_k, dq, input_precision=PRECISION)
            dq_ptr = dk_ptr - width + start * (3 * width)
            store_rows(dq_ptr, dq * scale, rows, NQ, 3 * width, D, BLOCK_D)
    store_rows(dk_ptr, dk * scale, keys, N, 3 * width, D, BLOCK_D)
    store_rows(dk_ptr + width, dv, keys, N, 3 * width, D, BLOCK_D)
    if TAIL > 0:
        store_rows(dk_ptr, tail_dk * scale, tail_keys, N, 3 * width, D, BLOCK_D)
        store_rows(dk_ptr + width, tail_dv, tail_keys, N, 3 * width, D, BLOCK_D)


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
    N,
    stride,
    scale_log2,
    IS_TAIL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one block of keys contributes to dQ (not yet scaled) of some queries."""
    HAS_HIDDEN_KEYS: tl.constexpr = key_mask_ptr is not None or IS_TAIL
    k = load_rows(k_ptr, keys, N, stride, IS_TAIL, D, BLOCK_D)
    v = load_rows(v_ptr, keys, N, stride, IS_TAIL, D, BLOCK_D)
    s = masked_scores(q, k, visible_keys(key_mask_ptr, keys, N), scale_log2, HAS_HIDDEN_KEYS, PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["N", "start", "NQ"])
def masked_attention_backward_queries(
    grad_ptr,  # as for masked_attention_backward_keys
    qkv_ptr,
    key_mask_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,  # (B, H, NQ) float32, written
    dqkv_ptr,  # (B, N, 3*H*D), written: the rows of q that are queries
    stride_qkvb,
    stride_qkvn,
    H,
    N,
    start,
    NQ,
    scale,
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dQ and delta of BLOCK_M queries of one head, over all keys."""
    blocks = tl.cdiv(NQ, BLOCK_M)
    sample, head, position, q_ptr, k_ptr, v_ptr = locate_head(qkv_ptr, stride_qkvb, H, blocks, D)
    width = H * D
    if key_mask_ptr is not None:
        key_mask_ptr += sample * N
    q_ptr += start * stride_qkvn
    grad_ptr += sample * NQ * width + head * D
    out_ptr += sample * NQ * width + head * D
    lse_ptr += position * NQ
    delta_ptr += position * NQ
    dq_ptr = dqkv_ptr + (sample * N + start) * (3 * width) + head * D

    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, rows, NQ, stride_qkvn, True, D, BLOCK_D)
    do = load_rows(grad_ptr, rows, NQ, width, True, D, BLOCK_D)
    out = load_rows(out_ptr, rows, NQ, width, True, D, BLOCK_D)
    lse = tl.load(lse_ptr + rows, mask=rows < NQ, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=rows < NQ)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = N // BLOCK_N * BLOCK_N
    for first in range(0, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        dq = _query_gradient_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, key_mask_ptr, keys, N, stride_qkvn, scale_log2, False,
            D, BLOCK_D, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        keys = end + tl.arange(0, TAIL)
        dq = _query_gradient_step(
            dq, q, do, lse, delta, k_ptr, v_ptr, key_mask_ptr, keys, N, stride_qkvn, scale_log2, True,
            D, BLOCK_D, PRECISION,
        )  # fmt: skip
    store_rows(dq_ptr, dq * scale, rows, NQ, 3 * width, D, BLOCK_D)


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    start: int,
    scale: float,
    dqkv: torch.Tensor,
) -> None:
    """Fills dqkv (B, N, 3*H*D), but for the q of tokens that are no queries.

    Args:
        grad: (B, Nq, H*D), gradient of `out`.
        qkv, key_mask, num_heads, start, scale: as `masked_attention.forward` took them.
        out, lse: what it wrote.

    All tensors but qkv are contiguous; grad, out and dqkv have the dtype of qkv.
    """
    batch, N, width = qkv.shape
    NQ, D = out.shape[1], width // (3 * num_heads)
    key = tuning_key(qkv.dtype, D)
    numbers = (qkv.stride(0), qkv.stride(1), num_heads, N, start, NQ, scale, scale * LOG2_E)
    heads = batch * num_heads

    tile = whole_tile(MASKED_ATTENTION_BACKWARD_WHOLE[key], N)
    if tile is not None:
        launch(
            masked_attention_backward_keys,
            (heads,),
            *(grad, qkv, key_mask, out, lse, None, dqkv, *numbers),
            ALL_KEYS=True,
            **constexprs_of(tile, qkv.dtype, D, N),
        )
        return
    delta = torch.empty_like(lse)
    tile = MASKED_ATTENTION_BACKWARD_QUERIES[key]
    launch(
        masked_attention_backward_queries,
        (triton.cdiv(NQ, tile.rows) * heads,),
        *(grad, qkv, key_mask, out, lse, delta, dqkv, *numbers),
        **constexprs_of(tile, qkv.dtype, D, N),
    )
    tile = MASKED_ATTENTION_BACKWARD_KEYS[key]
    launch(
        masked_attention_backward_keys,
        (triton.cdiv(N, tile.columns) * heads,),
        *(grad, qkv, key_mask, None, lse, delta, dqkv, *numbers),
        ALL_KEYS=False,
        **constexprs_of(tile, qkv.dtype, D, N) | {"TAIL": 0},
    )


def aot_variants() -> list[AotVariant]:
    """Those of the forward pass, but for the one that is known to spill registers (see `_tuning.py`)."""
    variants = []
    for dtype in AOT_DTYPES:
        for D, N, H, has_key_mask in AOT_SHAPES:
            key_mask = meta(1, N, dtype=torch.bool) if has_key_mask else None
            qkv, rows, lse = meta(1, N, 3 * H * D, dtype=dtype), meta(1, N, H * D, dtype=dtype), meta(1, H, N)
            with record() as launches:
                backward(rows, qkv, key_mask, rows, lse, H, 0, D**-0.5, qkv)
            if dtype == torch.float32 and D > 64:
                launches = [x for x in launches if x.kernel is not masked_attention_backward_queries]
            label = aot_label(dtype, D, N, has_key_mask)
            variants += label_launches(launches, label, expects_tensor_cores=True)
    return variants
