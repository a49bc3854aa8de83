"""softmax(logits) @ codebook with an online softmax: the probabilities live in registers, one tile at a time.

The backward pass computes them again from the logits. Its sums over codes and over rows have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant
from titok.kernels._tuning import (
    CODE_MIXTURE_DCODEBOOK,
    CODE_MIXTURE_DLOGITS,
    CODE_MIXTURE_FORWARD,
    CODE_MIXTURE_SPLITS,
    Tile,
)

MAX_CHANNELS = 256  # C stays whole in one tile


@triton.jit
def _load_logits(row_ptr, codes, rows, M, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """One float32 tile in base 2, -inf where there is no code; rows past the last are taken as zeros."""
    if K % BLOCK_K == 0:
        return tl.load(row_ptr + codes, mask=rows < M, other=0.0).to(tl.float32) * 1.4426950408889634
    x = tl.load(row_ptr + codes, mask=(rows < M) & (codes < K), other=0.0).to(tl.float32)
    return tl.where(codes < K, x * 1.4426950408889634, -float("inf"))


@triton.jit
def _load_codes(codebook_ptr, codes, channels, dtype, K: tl.constexpr, C: tl.constexpr):
    mask = (codes < K) & (channels < C)
    return tl.load(codebook_ptr + codes * C + channels, mask=mask, other=0.0).to(dtype)


@triton.jit
def code_mixture_forward(
    logits_ptr,  # (M, K)
    codebook_ptr,  # (K, C)
    out_ptr,  # (M, C)
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
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = _load_logits(logits_ptr + rows * K, start + tl.arange(0, BLOCK_K)[None, :], rows, M, K, BLOCK_K)
        raised = tl.maximum(highest, tl.max(x, 1))
        # while every logit so far is -inf, the shift is 0: exp2(-inf) is then 0 rather than NaN
        shift = tl.where(raised == -float("inf"), 0.0, raised)
        p = tl.exp2(x - shift[:, None])
        shrink = tl.exp2(highest - shift)
        highest = raised
        total = total * shrink + tl.sum(p, 1)
        codes = _load_codes(codebook_ptr, start + tl.arange(0, BLOCK_K)[:, None], channels, dtype, K, C)
        acc = tl.dot(p.to(dtype), codes, acc * shrink[:, None], input_precision="ieee")
    acc = acc / total[:, None]
    tl.store(out_ptr + rows * C + channels, acc.to(dtype), mask=(rows < M) & (channels < C))


@triton.jit
def code_mixture_dlogits(
    grad_ptr,  # (M, C)
    logits_ptr,  # (M, K)
    codebook_ptr,  # (K, C)
    out_ptr,  # (M, C): what the forward pass returned
    grad_logits_ptr,  # (M, K)
    lse_ptr,  # (M,) float32: base-2 logarithm of the softmax's denominator, for code_mixture_dcodebook
    M,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dtype = logits_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = _load_logits(logits_ptr + rows * K, start + tl.arange(0, BLOCK_K)[None, :], rows, M, K, BLOCK_K)
        raised = tl.maximum(highest, tl.max(x, 1))
        shift = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
        highest = raised
    lse = highest + tl.log2(total)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + row, lse, mask=row < M)

    channels = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < M) & (channels < C)
    grad = tl.load(grad_ptr + rows * C + channels, mask=mask, other=0.0)
    out = tl.load(out_ptr + rows * C + channels, mask=mask, other=0.0)
    # sum over codes of p * (grad . code) = grad . out: one pass over the codes is enough
    inner = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = _load_logits(logits_ptr + rows * K, k, rows, M, K, BLOCK_K)
        codes = _load_codes(codebook_ptr, start + tl.arange(0, BLOCK_K)[:, None], channels, dtype, K, C)
        dp = tl.dot(grad, tl.trans(codes), input_precision="ieee")
        dx = tl.exp2(x - lse[:, None]) * (dp - inner[:, None])
        tl.store(grad_logits_ptr + rows * K + k, dx.to(dtype), mask=(rows < M) & (k < K))


@triton.jit
def code_mixture_dcodebook(
    grad_ptr,  # (M, C)
    logits_ptr,  # (M, K)
    lse_ptr,  # (M,) float32, from code_mixture_dlogits
    partial_ptr,  # (splits, K, C) float32
    M,
    rows_per_split,
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
        lse = tl.load(lse_ptr + row, mask=row < M, other=float("inf"))  # no weight for rows past the last
        x = _load_logits(logits_ptr + row[None, :] * K, codes, row[None, :], M, K, BLOCK_K)
        p = tl.exp2(x - lse[None, :])
        inside = (row[:, None] < M) & (channels < C)
        grad = tl.load(grad_ptr + row[:, None] * C + channels, mask=inside, other=0.0)
        acc = tl.dot(p.to(dtype), grad, acc, input_precision="ieee")
    offset = tl.program_id(1).to(tl.int64) * K * C
    tl.store(partial_ptr + offset + codes * C + channels, acc, mask=(codes < K) & (channels < C))


def forward(logits: torch.Tensor, codebook: torch.Tensor, out: torch.Tensor) -> None:
    """out = softmax(logits) @ codebook: (M, K), (K, C) -> (M, C), all contiguous, C at most MAX_CHANNELS."""
    tile = CODE_MIXTURE_FORWARD[_width(logits)]
    grid = (triton.cdiv(logits.shape[0], tile.rows),)
    code_mixture_forward[grid](logits, codebook, out, logits.shape[0], **_launch(tile, *codebook.shape))


def dlogits(
    grad: torch.Tensor,
    logits: torch.Tensor,
    codebook: torch.Tensor,
    out: torch.Tensor,
    grad_logits: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fills grad_logits (M, K), and lse (M,) float32 for `dcodebook`."""
    tile = CODE_MIXTURE_DLOGITS[_width(logits)]
    grid = (triton.cdiv(logits.shape[0], tile.rows),)
    tensors = (grad, logits, codebook, out, grad_logits, lse)
    code_mixture_dlogits[grid](*tensors, logits.shape[0], **_launch(tile, *codebook.shape))


def splits(rows: int) -> int:
    """How many partial sums `dcodebook` writes for this many rows."""
    return min(CODE_MIXTURE_SPLITS, triton.cdiv(rows, 256))


def dcodebook(grad: torch.Tensor, logits: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor) -> None:
    """Fills partial (splits(M), K, C) float32, whose sum over the first axis is the codebook's gradient."""
    tile = CODE_MIXTURE_DCODEBOOK[_width(logits)]
    count, num_codes, channels = partial.shape
    per_split = triton.cdiv(triton.cdiv(logits.shape[0], count), tile.rows) * tile.rows
    launch = _launch(tile, num_codes, channels)
    grid = (triton.cdiv(num_codes, tile.columns), count)
    code_mixture_dcodebook[grid](grad, logits, lse, partial, logits.shape[0], per_split, **launch)


def _width(logits: torch.Tensor) -> int:
    return logits.element_size()


def _constants(tile: Tile, num_codes: int, channels: int) -> dict[str, int]:
    block_c = max(16, triton.next_power_of_2(channels))
    return {"K": num_codes, "C": channels, "BLOCK_M": tile.rows, "BLOCK_K": tile.columns, "BLOCK_C": block_c}


def _launch(tile: Tile, num_codes: int, channels: int) -> dict[str, int]:
    stages = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {**_constants(tile, num_codes, channels), **stages}


def aot_variants() -> list[AotVariant]:
    """TiTok's 1,024 proxy codes of 256 channels, in both precisions; the codebook as stored, float32."""
    variants = []
    for dtype, width in (("bf16", 2), ("fp32", 4)):
        x = f"*{dtype}"
        forward_args = {"logits_ptr": x, "codebook_ptr": x, "out_ptr": x, "M": "i32"}
        dlogits_args = dict.fromkeys(
            ("grad_ptr", "logits_ptr", "codebook_ptr", "out_ptr", "grad_logits_ptr"), x
        ) | {"lse_ptr": "*fp32", "M": "i32"}
        dcodebook_args = {"grad_ptr": x, "logits_ptr": x, "lse_ptr": "*fp32", "partial_ptr": "*fp32"} | {
            "M": "i32",
            "rows_per_split": "i32",
        }
        for kernel, tiles, args in (
            (code_mixture_forward, CODE_MIXTURE_FORWARD, forward_args),
            (code_mixture_dlogits, CODE_MIXTURE_DLOGITS, dlogits_args),
            (code_mixture_dcodebook, CODE_MIXTURE_DCODEBOOK, dcodebook_args),
        ):
            tile = tiles[width]
            constants = _constants(tile, 1024, 256)
            label, tensor_cores = f"{dtype} 1024 x 256", dtype == "bf16"
            variants.append(
                AotVariant(kernel, args, constants, tile.num_warps, tile.num_stages, label, tensor_cores)
            )
    return variants
