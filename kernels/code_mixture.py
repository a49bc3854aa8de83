"""softmax(logits) @ codebook for M rows of logits over K codes of C channels; no probability reaches memory.

Forward: a program takes BLOCK_M rows and walks over the codes in blocks of BLOCK_K with an online softmax (Milakov and
Gimelshein 2018, arXiv:1805.02867): where a block raises the maximum of a row, the row's sum and its accumulated mixture
are scaled down to it. C is held whole, rounded up to a power of two: BLOCK_C.

                K codes ->                             C channels
              +-------------+-------------+- -        +-----------+
    BLOCK_M   | logits tile | next tile   |   BLOCK_K | codebook  |   acc (BLOCK_M, BLOCK_C)
    rows      +-------------+-------------+- -        | tile      |     += exp(logits tile - max) @ codebook tile
                BLOCK_K                               +-----------+

Backward, with p the probabilities, computed again from the logits, and g the gradient of the mixture (M, C):

    d logits   = p * (g @ codebook^T - sum(g * mixture))     the last sum, over C, equals that of p * (g @ codebook^T)
    d codebook = p^T @ g

`code_mixture_dlogits` takes blocks of rows as the forward pass does. `code_mixture_dcodebook` takes BLOCK_K codes and
one of several equal parts of the rows; PyTorch adds up the parts. Sums have a fixed order: the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta, name_of
from titok.kernels._launch import launch, record
from titok.kernels._tuning import (
    CODE_MIXTURE_DCODEBOOK,
    CODE_MIXTURE_DLOGITS,
    CODE_MIXTURE_FORWARD,
    CODE_MIXTURE_ROWS_PER_SPLIT,
    CODE_MIXTURE_SPLITS,
    Tile,
)


@triton.jit
def _load_logits(row_ptr, codes, rows, M, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A float32 tile of logits; -inf past the last code, 0 past the last row."""
    if K % BLOCK_K == 0:
        return tl.load(row_ptr + codes, mask=rows < M, other=0.0).to(tl.float32)
    x = tl.load(row_ptr + codes, mask=(rows < M) & (codes < K), other=0.0).to(tl.float32)
    return tl.where(codes < K, x, -float("inf"))


@triton.jit
def _log2_weights(x, shift):
    """(x - shift) in units of log2, for exp2.

    The difference is exact where x is close to the shift. A product with log2(e) before it would round large logits.
    """
    return (x - shift) * 1.4426950408889634


@triton.jit
def _load_codes(codebook_ptr, codes, channels, dtype, K: tl.constexpr, C: tl.constexpr):
    mask = (codes < K) & (channels < C)
    return tl.load(codebook_ptr + codes * C + channels, mask=mask, other=0.0).to(dtype)


@triton.jit
def code_mixture_forward(
    logits_ptr,  # (M, K)
    codebook_ptr,  # (K, C)
    out_ptr,  # (M, C), written
    M,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = logits_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channels = tl.arange(0, BLOCK_C)[None, :]
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = _load_logits(logits_ptr + rows * K, start + tl.arange(0, BLOCK_K)[None, :], rows, M, K, BLOCK_K)
        new_max = tl.maximum(row_max, tl.max(x, 1))
        # While every logit so far is -inf, shift by 0: exp2(-inf - 0) is 0, but exp2(-inf + inf) is NaN.
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(_log2_weights(x, shift[:, None]))
        rescale = tl.exp2(_log2_weights(row_max, shift))
        row_max = new_max
        row_sum = row_sum * rescale + tl.sum(p, 1)
        codes = _load_codes(codebook_ptr, start + tl.arange(0, BLOCK_K)[:, None], channels, dtype, K, C)
        acc = tl.dot(p.to(dtype), codes, acc * rescale[:, None], input_precision="ieee")
    acc = acc / row_sum[:, None]
    tl.store(out_ptr + rows * C + channels, acc.to(dtype), mask=(rows < M) & (channels < C))


@triton.jit
def code_mixture_dlogits(
    grad_ptr,  # (M, C)
    logits_ptr,  # (M, K)
    codebook_ptr,  # (K, C)
    mixture_ptr,  # (M, C): result of the forward pass
    grad_logits_ptr,  # (M, K), written
    statistics_ptr,  # (2, M) float32, written: for each row the largest logit, and log2 of the sum of
    # exp(logit - largest); None where code_mixture_dcodebook does not run
    M,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = logits_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = _load_logits(logits_ptr + rows * K, start + tl.arange(0, BLOCK_K)[None, :], rows, M, K, BLOCK_K)
        new_max = tl.maximum(row_max, tl.max(x, 1))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        row_sum *= tl.exp2(_log2_weights(row_max, shift))
        row_sum += tl.sum(tl.exp2(_log2_weights(x, shift[:, None])), 1)
        row_max = new_max
    log2_sum = tl.log2(row_sum)
    if statistics_ptr is not None:
        row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(statistics_ptr + row, row_max, mask=row < M)
        tl.store(statistics_ptr + M + row, log2_sum, mask=row < M)

    channels = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < M) & (channels < C)
    grad = tl.load(grad_ptr + rows * C + channels, mask=mask, other=0.0)
    mixture = tl.load(mixture_ptr + rows * C + channels, mask=mask, other=0.0)
    inner = tl.sum(grad.to(tl.float32) * mixture.to(tl.float32), 1)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = _load_logits(logits_ptr + rows * K, k, rows, M, K, BLOCK_K)
        codes = _load_codes(codebook_ptr, start + tl.arange(0, BLOCK_K)[:, None], channels, dtype, K, C)
        dp = tl.dot(grad, tl.trans(codes), input_precision="ieee")
        p = tl.exp2(_log2_weights(x, row_max[:, None]) - log2_sum[:, None])
        dx = p * (dp - inner[:, None])
        tl.store(grad_logits_ptr + rows * K + k, dx.to(dtype), mask=(rows < M) & (k < K))


@triton.jit
def code_mixture_dcodebook(
    grad_ptr,  # (M, C)
    logits_ptr,  # (M, K)
    statistics_ptr,  # (2, M) float32, from code_mixture_dlogits
    partial_ptr,  # (splits, K, C) float32, written
    M,
    rows_per_split,  # a multiple of BLOCK_M
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = logits_ptr.dtype.element_ty
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    channels = tl.arange(0, BLOCK_C)[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_per_split
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, rows_per_split, BLOCK_M):
        row = first + start + tl.arange(0, BLOCK_M)
        row_max = tl.load(statistics_ptr + row, mask=row < M, other=0.0)
        log2_sum = tl.load(statistics_ptr + M + row, mask=row < M, other=float("inf"))  # p is 0 past the last row
        x = _load_logits(logits_ptr + row[None, :] * K, codes, row[None, :], M, K, BLOCK_K)
        p = tl.exp2(_log2_weights(x, row_max[None, :]) - log2_sum[None, :])
        mask = (row[:, None] < M) & (channels < C)
        grad = tl.load(grad_ptr + row[:, None] * C + channels, mask=mask, other=0.0)
        acc = tl.dot(p.to(dtype), grad, acc, input_precision="ieee")
    offset = tl.program_id(1).to(tl.int64) * K * C
    tl.store(partial_ptr + offset + codes * C + channels, acc, mask=(codes < K) & (channels < C))


def forward(logits: torch.Tensor, codebook: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (M, C) with softmax(logits) @ codebook, from logits (M, K) and codebook (K, C).

    All are contiguous and of one dtype, float16, bfloat16 or float32; M is at least 1 and C at most 256.
    """
    M = logits.shape[0]
    tile = CODE_MIXTURE_FORWARD[logits.element_size()]
    grid = (triton.cdiv(M, tile.rows),)
    launch(code_mixture_forward, grid, logits, codebook, out, M, **_constexprs(tile, codebook))


def backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    codebook: torch.Tensor,
    mixture: torch.Tensor,
    grad_logits: torch.Tensor,
    need_codebook: bool,
) -> torch.Tensor | None:
    """Fills grad_logits (M, K); returns the gradient of the codebook, (K, C) float32, or None if not needed.

    grad and mixture, the result of the forward pass, are (M, C), logits (M, K), codebook (K, C): all contiguous and of
    one dtype, float16, bfloat16 or float32; M is at least 1 and C at most 256.
    """
    M = logits.shape[0]
    statistics = torch.empty((2, M), dtype=torch.float32, device=logits.device) if need_codebook else None
    tile = CODE_MIXTURE_DLOGITS[logits.element_size()]
    launch(
        code_mixture_dlogits,
        (triton.cdiv(M, tile.rows),),
        *(grad, logits, codebook, mixture, grad_logits, statistics, M),
        **_constexprs(tile, codebook),
    )
    return None if statistics is None else _codebook_gradient(grad, logits, codebook, statistics)


def _codebook_gradient(
    grad: torch.Tensor, logits: torch.Tensor, codebook: torch.Tensor, statistics: torch.Tensor
) -> torch.Tensor:
    (M, K), C = logits.shape, codebook.shape[1]
    splits = min(CODE_MIXTURE_SPLITS, triton.cdiv(M, CODE_MIXTURE_ROWS_PER_SPLIT))
    tile = CODE_MIXTURE_DCODEBOOK[logits.element_size()]
    rows_per_split = triton.cdiv(triton.cdiv(M, splits), tile.rows) * tile.rows
    partial = torch.empty((splits, K, C), dtype=torch.float32, device=logits.device)
    launch(
        code_mixture_dcodebook,
        (triton.cdiv(K, tile.columns), splits),
        *(grad, logits, statistics, partial, M, rows_per_split),
        **_constexprs(tile, codebook),
    )
    return partial.sum(0)


def _constexprs(tile: Tile, codebook: torch.Tensor) -> dict[str, Any]:
    K, C = codebook.shape
    return {
        "K": K,
        "C": C,
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.columns,
        "BLOCK_C": max(16, triton.next_power_of_2(C)),  # tl.dot takes no fewer than 16
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def aot_variants() -> list[AotVariant]:
    """TiTok's proxy codes, 1,024 of 256 channels, for three pictures of 16 x 16 patches, in two precisions."""
    M, K, C = 3 * 256, 1024, 256
    variants = []
    for dtype in (torch.bfloat16, torch.float32):
        logits, codebook, rows = meta(M, K, dtype=dtype), meta(K, C, dtype=dtype), meta(M, C, dtype=dtype)
        with record() as launches:
            forward(logits, codebook, rows)
            backward(rows, logits, codebook, rows, meta(M, K, dtype=dtype), need_codebook=True)
        label = f"{name_of(dtype)} K={K} C={C}"
        # float32 products are exact FMAs: they run on no tensor core
        variants += label_launches(launches, label, expects_tensor_cores=dtype == torch.bfloat16)
    return variants
