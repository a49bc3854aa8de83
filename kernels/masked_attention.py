"""Multi-head attention from qkv (B, N, 3*H*D), as one linear layer writes it, to (B, Nq, H*D), as the next reads it.

    out = softmax(scale * q @ k^T) @ v    for each head, over the keys that key_mask (B, N) leaves visible

Queries are those of the Nq tokens from `start` on. A query that sees no key gives 0. Heads are read where they lie:

    one token of qkv:   | q of head 0 | q of head 1 | ... | k of head 0 | k of head 1 | ... | v of head 0 | ... |
                          D channels    D channels          D channels    D channels          D channels

A program takes BLOCK_M queries of one head. D is rounded up to a power of two: BLOCK_D. N is a power of two and a few
more (33, 65, 129, 289), so keys come in full blocks, which need no bounds check, and one narrower tail:

    N = 65, `whole`:    | BLOCK_N = 64 keys | TAIL = 16: 1 key, 15 masked |         80 columns rather than 128
    N = 289, `tiled`:   | 64 | 64 | 64 | 64 | TAIL = 64: 33 keys, 31 masked |

`masked_attention_forward_whole` holds all scores of its queries in registers and takes one softmax. Where they do not
fit, `masked_attention_forward_tiled` walks over the blocks with a running maximum (online softmax: Milakov and
Gimelshein 2018, arXiv:1805.02867; FlashAttention: Dao et al. 2022, arXiv:2205.14135). Tile sizes are in `_tuning.py`.
Scores are in units of log2, because exp2 is one instruction. The file is long: its two kernels share most parts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta, name_of
from titok.kernels._launch import launch, record
from titok.kernels._tuning import MASKED_ATTENTION_FORWARD, MASKED_ATTENTION_FORWARD_WHOLE, Tile

LOG2_E = math.log2(math.e)


# --- Parts that masked_attention_backward.py uses as well


@triton.jit
def locate_head(qkv_ptr, stride_qkvb, H, blocks, D: tl.constexpr):
    """Which sample and head a program works on, when each head has this many blocks of queries or keys.

    Returns the sample, the head, the head's position among those of all samples, and pointers to q, k and v of the
    head in the sample's first token.
    """
    position = tl.program_id(0) // blocks
    sample = (position // H).to(tl.int64)
    head = position % H
    q_ptr = qkv_ptr + sample * stride_qkvb + head * D
    return sample, head, position.to(tl.int64), q_ptr, q_ptr + H * D, q_ptr + 2 * H * D


@triton.jit
def load_rows(ptr, rows, row_count, stride, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, (len(rows), BLOCK_D); 0 past D and, where MASKED, past row_count."""
    columns = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(ptrs, mask=(rows[:, None] < row_count) & (columns[None, :] < D), other=0.0)
    elif D == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=columns[None, :] < D, other=0.0)


@triton.jit
def store_rows(ptr, tile, rows, row_count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < row_count) & (columns[None, :] < D)
    tl.store(ptr + rows[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible_keys(key_mask_ptr, keys, N):
    """Which of these keys exist and are not masked; key_mask_ptr points to the sample's row, or is None."""
    visible = keys < N
    if key_mask_ptr is not None:
        visible = visible & (tl.load(key_mask_ptr + keys, mask=visible, other=0) != 0)
    return visible


@triton.jit
def masked_scores(q, k, visible, scale_log2, HAS_HIDDEN_KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Scores (BLOCK_M, keys) in units of log2; -inf where the key is hidden."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if HAS_HIDDEN_KEYS:
        s = tl.where(visible[None, :], s, -float("inf"))
    return s


# --- Forward
#
# As keys have a tail, so have queries. The last program of a head takes a tile of ROW_TAIL queries where these are
# enough: 65 queries are computed as 64 + 16 rows rather than as 128. As many programs run, and they read as much.


@triton.jit
def _store_result(
    acc, row_max, row_sum, out_ptr, lse_ptr, rows, NQ, stride, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Writes acc / row_sum and the log-sum-exp; a row that sees no key has a sum of 0 and gets 0 and +inf."""
    sees_no_key = row_sum == 0
    out = acc / tl.where(sees_no_key, 1.0, row_sum)[:, None]
    store_rows(out_ptr, out, rows, NQ, stride, D, BLOCK_D)
    if lse_ptr is not None:
        lse = tl.where(sees_no_key, float("inf"), row_max + tl.log2(row_sum))
        tl.store(lse_ptr + rows, lse, mask=rows < NQ)


@triton.jit
def _attend_to_all(
    q_ptr,  # of the first query
    k_ptr,
    v_ptr,
    key_mask_ptr,
    out_ptr,
    lse_ptr,
    first,  # query of the tile
    stride_qkvn,
    H,
    N,
    NQ,
    scale_log2,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS queries of one head, with all keys at once."""
    HAS_HIDDEN_KEYS: tl.constexpr = key_mask_ptr is not None or TAIL == 0
    rows = first + tl.arange(0, ROWS)
    keys = tl.arange(0, BLOCK_N)
    q = load_rows(q_ptr, rows, NQ, stride_qkvn, True, D, BLOCK_D)
    k = load_rows(k_ptr, keys, N, stride_qkvn, TAIL == 0, D, BLOCK_D)
    v = load_rows(v_ptr, keys, N, stride_qkvn, TAIL == 0, D, BLOCK_D)
    s = masked_scores(q, k, visible_keys(key_mask_ptr, keys, N), scale_log2, HAS_HIDDEN_KEYS, PRECISION)
    row_max = tl.max(s, 1)
    if TAIL > 0:
        tail_keys = BLOCK_N + tl.arange(0, TAIL)
        tail_k = load_rows(k_ptr, tail_keys, N, stride_qkvn, True, D, BLOCK_D)
        tail_v = load_rows(v_ptr, tail_keys, N, stride_qkvn, True, D, BLOCK_D)
        tail_visible = visible_keys(key_mask_ptr, tail_keys, N)
        tail_s = masked_scores(q, tail_k, tail_visible, scale_log2, True, PRECISION)
        row_max = tl.maximum(row_max, tl.max(tail_s, 1))
    # Where a row sees no key, shift by 0: exp2(-inf - 0) is 0, but exp2(-inf + inf) is NaN.
    row_max = tl.where(row_max == -float("inf"), 0.0, row_max)
    p = tl.exp2(s - row_max[:, None])
    row_sum = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    if TAIL > 0:
        tail_p = tl.exp2(tail_s - row_max[:, None])
        row_sum += tl.sum(tail_p, 1)
        acc = tl.dot(tail_p.to(v.dtype), tail_v, acc, input_precision=PRECISION)
    _store_result(acc, row_max, row_sum, out_ptr, lse_ptr, rows, NQ, H * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["N", "start", "NQ"])
def masked_attention_forward_whole(
    qkv_ptr,  # (B, N, 3*H*D)
    key_mask_ptr,  # (B, N) bool or None
    out_ptr,  # (B, NQ, H*D), written
    lse_ptr,  # (B, H, NQ) float32, written, or None
    stride_qkvb,
    stride_qkvn,
    H,
    N,
    start,
    NQ,
    scale_log2,  # scale * log2(e)
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M or ROW_TAIL queries of one head, all keys (BLOCK_N + TAIL) at once."""
    blocks = tl.cdiv(NQ, BLOCK_M)
    sample, head, position, q_ptr, k_ptr, v_ptr = locate_head(qkv_ptr, stride_qkvb, H, blocks, D)
    if key_mask_ptr is not None:
        key_mask_ptr += sample * N
    if lse_ptr is not None:
        lse_ptr += position * NQ
    q_ptr += start * stride_qkvn
    out_ptr += sample * NQ * (H * D) + head * D
    block = tl.program_id(0) % blocks
    first = block * BLOCK_M
    if ROW_TAIL > 0:  # noqa: SIM102 (the outer condition is known to the compiler)
        if block == blocks - 1:
            _attend_to_all(
                q_ptr, k_ptr, v_ptr, key_mask_ptr, out_ptr, lse_ptr, first, stride_qkvn, H, N, NQ, scale_log2,
                ROW_TAIL, D, BLOCK_N, TAIL, BLOCK_D, PRECISION,
            )  # fmt: skip
            return
    _attend_to_all(
        q_ptr, k_ptr, v_ptr, key_mask_ptr, out_ptr, lse_ptr, first, stride_qkvn, H, N, NQ, scale_log2,
        BLOCK_M, D, BLOCK_N, TAIL, BLOCK_D, PRECISION,
    )  # fmt: skip


@triton.jit
def _online_step(
    acc,
    row_max,
    row_sum,
    q,
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
    """Takes one block of keys into each row's running maximum, its sum, and its weighted sum of values (acc)."""
    HAS_HIDDEN_KEYS: tl.constexpr = key_mask_ptr is not None or IS_TAIL
    k = load_rows(k_ptr, keys, N, stride, IS_TAIL, D, BLOCK_D)
    s = masked_scores(q, k, visible_keys(key_mask_ptr, keys, N), scale_log2, HAS_HIDDEN_KEYS, PRECISION)
    new_max = tl.maximum(row_max, tl.max(s, 1))
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    p = tl.exp2(s - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    v = load_rows(v_ptr, keys, N, stride, IS_TAIL, D, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * rescale + tl.sum(p, 1)


@triton.jit
def _attend_in_blocks(
    q_ptr,  # as for _attend_to_all
    k_ptr,
    v_ptr,
    key_mask_ptr,
    out_ptr,
    lse_ptr,
    first,
    stride_qkvn,
    H,
    N,
    NQ,
    scale_log2,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS queries of one head, with one block of keys after the other."""
    rows = first + tl.arange(0, ROWS)
    q = load_rows(q_ptr, rows, NQ, stride_qkvn, True, D, BLOCK_D)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    end = N // BLOCK_N * BLOCK_N
    for first_key in range(0, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        acc, row_max, row_sum = _online_step(
            acc, row_max, row_sum, q, k_ptr, v_ptr, key_mask_ptr, keys, N, stride_qkvn, scale_log2, False,
            D, BLOCK_D, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        keys = end + tl.arange(0, TAIL)
        acc, row_max, row_sum = _online_step(
            acc, row_max, row_sum, q, k_ptr, v_ptr, key_mask_ptr, keys, N, stride_qkvn, scale_log2, True,
            D, BLOCK_D, PRECISION,
        )  # fmt: skip
    _store_result(acc, row_max, row_sum, out_ptr, lse_ptr, rows, NQ, H * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["N", "start", "NQ"])
def masked_attention_forward_tiled(
    qkv_ptr,  # as for masked_attention_forward_whole
    key_mask_ptr,
    out_ptr,
    lse_ptr,
    stride_qkvb,
    stride_qkvn,
    H,
    N,
    start,
    NQ,
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M or ROW_TAIL queries of one head, the keys in blocks of BLOCK_N and then their tail."""
    blocks = tl.cdiv(NQ, BLOCK_M)
    sample, head, position, q_ptr, k_ptr, v_ptr = locate_head(qkv_ptr, stride_qkvb, H, blocks, D)
    if key_mask_ptr is not None:
        key_mask_ptr += sample * N
    if lse_ptr is not None:
        lse_ptr += position * NQ
    q_ptr += start * stride_qkvn
    out_ptr += sample * NQ * (H * D) + head * D
    block = tl.program_id(0) % blocks
    first = block * BLOCK_M
    if ROW_TAIL > 0:  # noqa: SIM102 (the outer condition is known to the compiler)
        if block == blocks - 1:
            _attend_in_blocks(
                q_ptr, k_ptr, v_ptr, key_mask_ptr, out_ptr, lse_ptr, first, stride_qkvn, H, N, NQ, scale_log2,
                ROW_TAIL, D, BLOCK_N, TAIL, BLOCK_D, PRECISION,
            )  # fmt: skip
            return
    _attend_in_blocks(
        q_ptr, k_ptr, v_ptr, key_mask_ptr, out_ptr, lse_ptr, first, stride_qkvn, H, N, NQ, scale_log2,
        BLOCK_M, D, BLOCK_N, TAIL, BLOCK_D, PRECISION,
    )  # fmt: skip


# --- Launchers


def key_blocks(N: int) -> tuple[int, int]:
    """(BLOCK_N, TAIL) that hold N keys with the fewest columns: two powers of two, or one and 0; none below 16."""
    whole = max(16, triton.next_power_of_2(N))
    half = whole // 2
    if half < 16 or half >= N:
        return whole, 0
    tail = max(16, triton.next_power_of_2(N - half))
    return (half, tail) if tail < half else (whole, 0)


def query_blocks(NQ: int, rows: int) -> tuple[int, int]:
    """(BLOCK_M, ROW_TAIL) for NQ queries in tiles of `rows`. The last tile is a power of two, no larger than needed."""
    rest = NQ % rows
    tail = max(16, triton.next_power_of_2(rest))
    if rest == 0 or tail >= rows:
        return rows, 0
    return (tail, 0) if rows > NQ else (rows, tail)


def tuning_key(dtype: torch.dtype, D: int) -> tuple[int, int]:
    """Key of the tables in `_tuning.py`: bytes per element; head dim as a power of two, at least 64."""
    return dtype.itemsize, max(64, triton.next_power_of_2(D))


def constexprs_of(tile: Tile, dtype: torch.dtype, D: int, N: int) -> dict[str, Any]:
    """Compile-time arguments that all attention kernels share, and warps and stages."""
    block_n, tail = tile.columns, 0
    if block_n == 0:
        block_n, tail = key_blocks(N)
    elif N % block_n:
        tail = max(16, triton.next_power_of_2(N % block_n))
    return {
        "D": D,
        "BLOCK_M": tile.rows,
        "BLOCK_N": block_n,
        "TAIL": tail,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        # Three TF32 products that correct each other's rounding: the accuracy of float32 on tensor cores.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def whole_tile(tiles: tuple[tuple[int, Tile], ...], N: int) -> Tile | None:
    """The tile of a kernel whose programs hold all keys at once; None where there are too many keys for one."""
    return next((tile for most, tile in tiles if sum(key_blocks(N)) <= most), None)


def forward(
    qkv: torch.Tensor,
    key_mask: torch.Tensor | None,
    num_heads: int,
    start: int,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out (B, Nq, H*D) and, where given, lse (B, H, Nq) float32: the log-sum-exp of the scores, base 2.

    Args:
        qkv: (B, N, 3*H*D), float16, bfloat16 or float32, of any strides with a last one of 1 and with offsets within a
            sample below 2^31; B, N and Nq are at least 1.
        key_mask: (B, N) bool, contiguous, true where a key is visible; None: all are.
        start: the token of the first query.
        scale: of the scores, before the softmax.
    """
    batch, N, width = qkv.shape
    NQ, D = out.shape[1], width // (3 * num_heads)
    key = tuning_key(qkv.dtype, D)
    kernel: Any = masked_attention_forward_whole
    tile = whole_tile(MASKED_ATTENTION_FORWARD_WHOLE[key], N)
    if tile is None:
        kernel, tile = masked_attention_forward_tiled, MASKED_ATTENTION_FORWARD[key]
    block_m, row_tail = query_blocks(NQ, tile.rows)
    launch(
        kernel,
        (triton.cdiv(NQ, block_m) * batch * num_heads,),
        *(qkv, key_mask, out, lse, qkv.stride(0), qkv.stride(1), num_heads, N, start, NQ, scale * LOG2_E),
        # With it, some of the uses of a score would see its product with the scale unrounded, others rounded: of
        # float32 scores in the thousands, the weights of the keys would no longer add up to their sum.
        fp_fusion=qkv.dtype != torch.float32,
        **constexprs_of(tile, qkv.dtype, D, N) | {"BLOCK_M": block_m, "ROW_TAIL": row_tail},
    )


AOT_DTYPES = (torch.bfloat16, torch.float32)  # float16 has the tiles of bfloat16
AOT_SHAPES = (  # D, N, H, whether there is a key mask
    (48, 33, 16, False),  # generators: the class and K latent tokens
    (48, 65, 16, False),
    (64, 65, 16, False),
    (64, 129, 16, False),
    (64, 289, 16, False),  # tokenizers: 256 patches, the class token and K latents
    (64, 321, 12, False),
    (64, 385, 8, False),
    (64, 33, 16, True),  # no preset: a key mask, head dims that are no power of two or above 64
    (64, 129, 16, True),
    (64, 289, 16, True),
    (72, 321, 16, False),
    (128, 65, 16, False),
)


def aot_label(dtype: torch.dtype, D: int, N: int, has_key_mask: bool) -> str:
    return f"{name_of(dtype)} D={D} N={N}{' key_mask' if has_key_mask else ''}"


def aot_variants() -> list[AotVariant]:
    variants = []
    for dtype in AOT_DTYPES:
        for D, N, H, has_key_mask in AOT_SHAPES:
            key_mask = meta(1, N, dtype=torch.bool) if has_key_mask else None
            qkv, out, lse = meta(1, N, 3 * H * D, dtype=dtype), meta(1, N, H * D, dtype=dtype), meta(1, H, N)
            with record() as launches:
                forward(qkv, key_mask, H, 0, D**-0.5, out, lse)
            label = aot_label(dtype, D, N, has_key_mask)
            variants += label_launches(launches, label, expects_tensor_cores=True)
        with record() as launches:  # the last layer of an encoder: queries are the latent tokens alone
            forward(meta(1, 289, 3072, dtype=dtype), None, 16, 257, 0.125, meta(1, 32, 1024, dtype=dtype), None)
        variants += label_launches(launches, f"{name_of(dtype)} D=64 N=289 queries=32", expects_tensor_cores=True)
    return variants
