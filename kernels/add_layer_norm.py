"""Residual add and LayerNorm (Ba et al. 2016, arXiv:1607.06450) of M rows of D channels.

    total      = x + residual                                  rounded to its dtype
    normalised = u * weight + bias,   u = (total - mean) * rstd,   rstd = 1 / sqrt(variance + eps)

Forward: one program per row. BLOCK_D is D rounded up to a power of two, so that the row stays in registers and each
value is read and written once. The variance is the mean of squared distances from the mean, which loses no digits
where E[x^2] - E[x]^2 would cancel.

Backward, with dy the gradient of `normalised`, sums over rows and means over the channels of a row:

    d weight = sum(dy * u),   d bias = sum(dy)
    d x = d residual = rstd * (dy * weight - mean(dy * weight) - u * mean(dy * weight * u)) + grad_total

The statistics are computed again from `total`, which has to be read anyway. Each program takes every programs-th block
of BLOCK_M rows and writes its own partial sums, which PyTorch adds up: no atomics, the same bits in every run.

    block of rows   0   1   ...   programs - 1   programs   programs + 1   ...
    its program     0   1   ...   programs - 1   0          1              ...
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta, name_of
from titok.kernels._launch import launch, record
from titok.kernels._tuning import (
    ADD_LAYER_NORM_BACKWARD_VALUES,
    ADD_LAYER_NORM_CHANNELS_PER_WARP,
    ADD_LAYER_NORM_PROGRAMS,
    Tile,
)


@triton.jit
def add_layer_norm_forward(
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    total_ptr,  # (M, D), written, or None
    normalised_ptr,  # (M, D), written
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_D)
    mask = channels < D
    offsets = tl.program_id(0).to(tl.int64) * D + channels
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # The rounded sum is normalised: the backward pass reads nothing else.
    if total_ptr is not None:
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, total, mask=mask)
        x = total.to(tl.float32)
    elif x_ptr.dtype.element_ty == residual_ptr.dtype.element_ty:
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)  # of two dtypes the sum is float32
    mean = tl.div_rn(tl.sum(x, 0), tl.full((), D, tl.float32))  # so that the mean of equal values is that value
    centred = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    weight = tl.load(weight_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    tl.store(normalised_ptr + offsets, y.to(normalised_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_layer_norm_backward(
    grad_total_ptr,  # (M, D) or None
    grad_normalised_ptr,  # (M, D)
    total_ptr,  # (M, D)
    weight_ptr,  # (D,)
    grad_ptr,  # (M, D), written: gradient of x and of residual
    partial_ptr,  # (2, programs, D) float32, written: d weight, d bias
    M,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    channels = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + channels, mask=channels < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_D,), tl.float32)
    grad_bias = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(program * BLOCK_M, M, programs * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
        mask = (rows < M) & (channels < D)
        offsets = rows * D + channels
        x = tl.load(total_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(grad_normalised_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - tl.sum(x, 1)[:, None] / D, 0.0)
        variance = tl.sum(centred * centred, 1)[:, None] / D
        # Rows past the last have a variance of 0: with an eps of 0, 0 * rsqrt(0) would be NaN.
        rstd = tl.rsqrt(tl.where(rows < M, variance + eps, 1.0))
        u = centred * rstd
        grad_weight += tl.sum(dy * u, 0)
        grad_bias += tl.sum(dy, 0)
        du = dy * weight
        dx = (du - tl.sum(du, 1)[:, None] / D - u * (tl.sum(du * u, 1)[:, None] / D)) * rstd
        if grad_total_ptr is not None:
            dx += tl.load(grad_total_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)
    columns = tl.arange(0, BLOCK_D)
    partial_ptr += program.to(tl.int64) * D + columns
    tl.store(partial_ptr, grad_weight, mask=columns < D)
    tl.store(partial_ptr + programs.to(tl.int64) * D, grad_bias, mask=columns < D)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    normalised: torch.Tensor,
) -> None:
    """Fills normalised and, where given, total (..., D) from x and residual (..., D), weight and bias (D,).

    Every tensor is contiguous and of its own floating dtype; there is at least one row, and D is at most 8,192.
    """
    D = weight.shape[0]
    tile = _forward_tile(D)
    launch(
        add_layer_norm_forward,
        (x.numel() // D,),
        *(x, residual, weight, bias, total, normalised, eps),
        D=D,
        BLOCK_D=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def backward(
    grad_total: torch.Tensor | None,
    grad_normalised: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
) -> torch.Tensor:
    """Fills grad (..., D), the gradient of x and of residual; returns those of weight and bias, (2, D) float32.

    Rows (..., D) and weight (D,) are contiguous and of their own floating dtypes; there is at least one row, and D is
    at most 8,192.
    """
    D = weight.shape[0]
    M = total.numel() // D
    tile = _backward_tile(D)
    programs = min(ADD_LAYER_NORM_PROGRAMS, triton.cdiv(M, tile.rows))
    partial = torch.empty((2, programs, D), dtype=torch.float32, device=total.device)
    launch(
        add_layer_norm_backward,
        (programs,),
        *(grad_total, grad_normalised, total, weight, grad, partial, M, eps),
        D=D,
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partial.sum(1)


def _forward_tile(D: int) -> Tile:
    block = triton.next_power_of_2(D)
    return Tile(1, block, min(8, max(1, block // ADD_LAYER_NORM_CHANNELS_PER_WARP)), 1)


def _backward_tile(D: int) -> Tile:
    block = triton.next_power_of_2(D)
    rows = max(1, min(16, ADD_LAYER_NORM_BACKWARD_VALUES // block))
    return Tile(rows, block, 4 if rows * block <= ADD_LAYER_NORM_BACKWARD_VALUES else 8, 1)


def aot_variants() -> list[AotVariant]:
    """The widths of TiTok's S, B and L: all in bfloat16, and a float32 stream with bfloat16 branches (autocast)."""
    half = torch.bfloat16
    variants = []
    for D in (512, 768, 1024):
        for stream in (torch.bfloat16, torch.float32):
            M = 289  # one sample; odd, so that the machine code is that for any number of rows
            parameter = meta(D, dtype=stream)
            with record() as launches:
                forward(
                    *(meta(M, D, dtype=stream), meta(M, D, dtype=half), parameter, parameter, 1e-6),
                    *(meta(M, D, dtype=stream), meta(M, D, dtype=half)),
                )
                backward(
                    *(meta(M, D, dtype=stream), meta(M, D, dtype=half), meta(M, D, dtype=stream), parameter, 1e-6),
                    meta(M, D, dtype=stream),
                )
            branch = "" if stream == half else "+bf16"
            variants += label_launches(launches, f"{name_of(stream)}{branch} D={D}")
            with record() as launches:
                forward(
                    *(meta(M, D, dtype=stream), meta(M, D, dtype=half), parameter, parameter, 1e-6),
                    *(None, meta(M, D, dtype=half)),
                )
            variants += label_launches(launches, f"{name_of(stream)}{branch} D={D} without sum")
    return variants
