"""Linear layers with what follows them in a block of a transformer, in one launch each; for inference.

    linear_gelu:       gelu(y),                                y = x @ weight^T + bias
    linear_add_norm:   total = y + residual, and its LayerNorm

x is (M, K), weight (N, K), y (M, N). As in separate launches, y is rounded to its dtype before the GELU, which is the
exact one (erf), and before the sum, which is rounded again before its norm.

A program multiplies BLOCK_M rows by BLOCK_N columns. A norm needs all N columns of a row, which several programs
compute. Each of them writes its part of the sum, then counts itself in `arrived`; the one that counts last reads the
rows, which are in the L2 cache by then, and normalises them:

    arrived[row block]   0 -> 1 -> ... -> N / BLOCK_N, then 0 again for the next launch

Every sum is taken in an order that the shape alone decides: the same bits come out in every run, whichever program is
last. No model uses these kernels before a measurement has shown where they are faster: see `_tuning.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta
from titok.kernels._launch import launch, record
from titok.kernels._tuning import GELU, LINEAR, LINEAR_DEPTH, LINEAR_GELU, LINEAR_NORM_VALUES, Tile


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,  # for its dtype alone
    rows,
    columns,
    M,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y of some rows and columns, (BLOCK_M, BLOCK_N) float32, rounded to the dtype of the result."""
    channels = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * K + channels[None, :]
    weight_ptrs = weight_ptr + columns[None, :] * K + channels[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs + first, mask=(rows < M)[:, None], other=0.0)
        acc = tl.dot(x, tl.load(weight_ptrs + first), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    return acc.to(out_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _gelu(y):
    """The exact GELU, y times the normal distribution's share below y, within 1e-7 |y| of it.

    By Abramowitz and Stegun's formula 7.1.26 for erf, which takes a third of the instructions of the erf of CUDA.
    """
    a = tl.abs(y) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * a)
    polynomial = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    tail = 0.5 * polynomial * tl.exp2(a * a * -1.4426950408889634)  # the share beyond |y|
    return y * tl.where(y < 0, tail, 1.0 - tail)


@triton.jit
def linear_gelu_in_place(
    x_ptr,  # (count,), overwritten
    count,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + offsets, _gelu(x).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_gelu(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    out_ptr,  # (M, N), written
    M,
    K: tl.constexpr,  # a multiple of BLOCK_K
    N: tl.constexpr,  # a multiple of BLOCK_N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) // (N // BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _product(x_ptr, weight_ptr, bias_ptr, out_ptr, rows, columns, M, K, BLOCK_M, BLOCK_N, BLOCK_K)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_ptrs, _gelu(y).to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None])


@triton.jit
def linear_add_norm(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    residual_ptr,  # (M, N)
    norm_weight_ptr,  # (N,)
    norm_bias_ptr,  # (N,)
    total_ptr,  # (M, N), written
    normalised_ptr,  # (M, N), written
    arrived_ptr,  # (blocks of rows,) int32 zeros, and zeros again at the end
    eps,
    M,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM_ROWS: tl.constexpr,  # rows that are normalised at once, at most BLOCK_M
    BLOCK_D: tl.constexpr,  # a power of two, at least N
):
    row_block = tl.program_id(0) // (N // BLOCK_N)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None]
    y = _product(x_ptr, weight_ptr, bias_ptr, total_ptr, rows, columns, M, K, BLOCK_M, BLOCK_N, BLOCK_K)
    y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + offsets, y.to(total_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # all threads have stored their part before one of them counts the program
    count = tl.atomic_add(arrived_ptr + row_block, 1, sem="acq_rel")
    if count == N // BLOCK_N - 1:
        tl.store(arrived_ptr + row_block, 0)
        channels = tl.arange(0, BLOCK_D)
        inside_row = channels < N
        norm_weight = tl.load(norm_weight_ptr + channels, mask=inside_row, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + channels, mask=inside_row, other=0.0).to(tl.float32)
        for first in range(0, BLOCK_M, NORM_ROWS):
            some_rows = row_block * BLOCK_M + first + tl.arange(0, NORM_ROWS)
            places = some_rows.to(tl.int64)[:, None] * N + channels[None, :]
            mask = (some_rows < M)[:, None] & inside_row[None, :]
            # Not from the L1 cache, which does not see what other multiprocessors have written.
            total = tl.load(total_ptr + places, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            centred = tl.where(mask, total - (tl.sum(total, 1) / N)[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
            normalised = centred * rstd[:, None] * norm_weight[None, :] + norm_bias[None, :]
            tl.store(normalised_ptr + places, normalised.to(normalised_ptr.dtype.element_ty), mask=mask)


# --- Launchers


def why_not(K: int, N: int, dtype: torch.dtype) -> str | None:
    """Why a layer with K inputs and N outputs cannot be computed here; None where it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype: expected bfloat16 or float16, got {dtype}"
    if K % LINEAR_DEPTH or N % LINEAR.columns:
        return f"shape: expected K a multiple of {LINEAR_DEPTH} and N of {LINEAR.columns}, got {K} and {N}"
    return None


def row_blocks(M: int) -> int:
    """How many counters `add_norm_forward` needs for M rows."""
    return triton.cdiv(M, LINEAR.rows)


def _blocks(tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": LINEAR_DEPTH,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def gelu_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Fills out (M, N) with gelu(x @ weight^T + bias). All tensors are contiguous and of one dtype.

    Args:
        x: (M, K), M at least 1.
        weight: (N, K); `why_not(K, N, dtype)` is None.
        bias: (N,) or None.
    """
    (M, K), N = x.shape, len(weight)
    grid = (triton.cdiv(M, LINEAR_GELU.rows) * (N // LINEAR_GELU.columns),)
    launch(linear_gelu, grid, x, weight, bias, out, M, K=K, N=N, **_blocks(LINEAR_GELU))


def gelu(x: torch.Tensor) -> None:
    """Overwrites x, contiguous in 16 bits and not empty, with its GELU."""
    tile = GELU
    grid = (triton.cdiv(x.numel(), tile.columns),)
    launch(
        linear_gelu_in_place,
        grid,
        x,
        x.numel(),
        BLOCK=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def add_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    normalised: torch.Tensor,
    arrived: torch.Tensor,
) -> None:
    """Fills total (M, N) with x @ weight^T + bias + residual, and normalised (M, N) with the LayerNorm of it.

    Args:
        x, weight, bias: as for `gelu_forward`.
        residual: (M, N).
        norm_weight, norm_bias: (N,).
        arrived: (row_blocks(M),) int32 zeros, which are zeros again afterwards. No other launch uses them meanwhile.
    """
    (M, K), N = x.shape, len(weight)
    width = triton.next_power_of_2(N)
    launch(
        linear_add_norm,
        (triton.cdiv(M, LINEAR.rows) * (N // LINEAR.columns),),
        *(x, weight, bias, residual, norm_weight, norm_bias, total, normalised, arrived, eps, M),
        K=K,
        N=N,
        NORM_ROWS=max(1, min(LINEAR.rows, LINEAR_NORM_VALUES // width)),
        BLOCK_D=width,
        **_blocks(LINEAR),
    )


AOT_GELU = ((768, 3072), (1024, 4096))  # K, N of fc1
AOT_ADD_NORM = ((768, 768), (3072, 768), (4096, 1024))  # of the projection of attention, of fc2


def aot_variants() -> list[AotVariant]:
    bf16, rows = torch.bfloat16, 130  # one guided sample of 65 tokens
    variants: list[AotVariant] = []
    for K, N in (*AOT_GELU, *AOT_ADD_NORM):
        x, weight, vector = meta(rows, K, dtype=bf16), meta(N, K, dtype=bf16), meta(N, dtype=bf16)
        out = meta(rows, N, dtype=bf16)
        with record() as launches:
            if (K, N) in AOT_GELU:
                gelu_forward(x, weight, vector, out)
            else:
                arrived = meta(row_blocks(rows), dtype=torch.int32)
                add_norm_forward(x, weight, vector, out, vector, vector, 1e-6, out, out, arrived)
        variants += label_launches(launches, f"bf16 K={K} N={N}", expects_tensor_cores=True)
    with record() as launches:
        gelu(meta(rows, 3072, dtype=bf16))
    return variants + label_launches(launches, "bf16")
