"""Attention from (B, N, 3*H*D), as the linear layer wrote it, to (B, Nq, H*D), as the next one reads it.

Token counts here are a power of two and a few: 33, 65, 129, 289. Keys therefore come as full blocks, which need no
bounds, and one tail of a narrower power of two: 65 = 64 + 16 wide, not 128. Where they are few, a program holds
all scores of its queries and takes one softmax; else it goes over the blocks with a running maximum
(Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022).
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
DTYPES = (torch.bfloat16, torch.float32)  # of what is compiled ahead of time; float16 takes bfloat16's tiles


# --- tiles


@triton.jit
def load_rows(ptr, rows, row_count, stride, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
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
def store_rows(ptr, tile, rows, row_count, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < row_count) & (columns[None, :] < HEAD_DIM)
    tl.store(ptr + rows[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible_keys(key_mask_ptr, keys, tokens):
    """Which of these keys exist and may be seen."""
    inside = keys < tokens
    if key_mask_ptr is not None:
        inside = inside & (tl.load(key_mask_ptr + keys, mask=inside, other=0) != 0)
    return inside


@triton.jit
def masked_scores(q, k, visible, scale_log2, HIDES: tl.constexpr, PRECISION: tl.constexpr):
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
    store_rows(out_ptr, out, rows, queries, stride, HEAD_DIM, BLOCK_D)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, tl.where(blind, float("inf"), m + tl.log2(total)), mask=rows < queries)


@triton.jit(do_not_specialize=["tokens", "start", "queries"])
def masked_attention_forward_whole(
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
    q = load_rows(q_ptr + start * stride_qkvn, rows, queries, stride_qkvn, True, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr, keys, tokens, stride_qkvn, TAIL == 0, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, keys, tokens, stride_qkvn, TAIL == 0, HEAD_DIM, BLOCK_D)
    s = masked_scores(q, k, visible_keys(key_mask_ptr, keys, tokens), scale_log2, HIDES, PRECISION)
    m = tl.max(s, 1)
    if TAIL > 0:
        tail_keys = BLOCK_N + tl.arange(0, TAIL)
        tail_k = load_rows(k_ptr, tail_keys, tokens, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        tail_v = load_rows(v_ptr, tail_keys, tokens, stride_qkvn, True, HEAD_DIM, BLOCK_D)
        tail_s = masked_scores(
            q, tail_k, visible_keys(key_mask_ptr, tail_keys, tokens), scale_log2, True, PRECISION
        )
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
    k = load_rows(k_ptr, keys, tokens, stride, IS_TAIL, HEAD_DIM, BLOCK_D)
    s = masked_scores(q, k, visible_keys(key_mask_ptr, keys, tokens), scale_log2, HIDES, PRECISION)
    new_m = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(new_m == -float("inf"), 0.0, new_m)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    v = load_rows(v_ptr, keys, tokens, stride, IS_TAIL, HEAD_DIM, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, new_m, total * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=["tokens", "start", "queries"])
def masked_attention_forward_tiled(
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
    q = load_rows(q_ptr + start * stride_qkvn, rows, queries, stride_qkvn, True, HEAD_DIM, BLOCK_D)
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


# --- launchers


def width_of(tokens: int) -> tuple[int, int]:
    """(BLOCK_N, TAIL), the narrowest pair of powers of two, or one alone, that holds this many keys."""
    whole = max(16, triton.next_power_of_2(tokens))
    half = whole // 2
    if half < 16 or tokens <= half:
        return whole, 0
    tail = max(16, triton.next_power_of_2(tokens - half))
    return (half, tail) if tail < half else (whole, 0)


def tuning_key(dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
    return dtype.itemsize, max(64, triton.next_power_of_2(head_dim))


def constants_of(tile: Tile, dtype: torch.dtype, head_dim: int, tokens: int) -> dict[str, Any]:
    block_n, tail = tile.columns, 0
    if block_n == 0:
        block_n, tail = width_of(tokens)
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


def whole_tile(tiles: tuple[tuple[int, Tile], ...], tokens: int) -> Tile | None:
    """The tile of a kernel whose programs hold all keys; None where there are too many."""
    return next((tile for most, tile in tiles if sum(width_of(tokens)) <= most), None)


def _plan(dtype: torch.dtype, head_dim: int, tokens: int) -> tuple[Any, dict[str, Any], Tile]:
    """Kernel, constants and tile."""
    key = tuning_key(dtype, head_dim)
    if tile := whole_tile(_tuning.MASKED_ATTENTION_FORWARD_WHOLE[key], tokens):
        return masked_attention_forward_whole, constants_of(tile, dtype, head_dim, tokens), tile
    tile = _tuning.MASKED_ATTENTION_FORWARD[key]
    return masked_attention_forward_tiled, constants_of(tile, dtype, head_dim, tokens), tile


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
    kernel, constants, tile = _plan(qkv.dtype, width // (3 * num_heads), tokens)
    kernel[(triton.cdiv(queries, tile.rows) * batch * num_heads,)](
        qkv, key_mask, out, lse, qkv.stride(0), qkv.stride(1), num_heads, tokens, start, queries, scale * LOG2_E,
        **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


# (head dim, tokens, with a key mask)
PRESETS = [
    (48, 33, False),
    (48, 65, False),
    (64, 65, False),
    (64, 129, False),
]  # generators: a condition and K codes
PRESETS += [
    (64, 289, False),
    (64, 321, False),
    (64, 385, False),
]  # tokenizers: patches, the class token, K latents
OTHERS = [(64, 33, True), (64, 129, True), (64, 289, True), (72, 321, False), (128, 65, False)]


def aot_variants() -> list[AotVariant]:
    return [variant(dtype, *shape, *_plan(dtype, *shape[:2])) for dtype in DTYPES for shape in PRESETS + OTHERS]


def variant(
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
