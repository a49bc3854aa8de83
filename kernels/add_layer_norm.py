"""Residual add and LayerNorm: every row is read once, kept in registers, and written as sum and normalised.

The backward pass computes the statistics again from the sum. Each of its programs takes the same rows in the same
order in every run, so that d weight and d bias are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant
from titok.kernels._tuning import (
    ADD_LAYER_NORM_BACKWARD_VALUES,
    ADD_LAYER_NORM_CHANNELS_PER_WARP,
    ADD_LAYER_NORM_PROGRAMS,
    Tile,
)

MAX_CHANNELS = 8192  # a row stays in one program's registers


@triton.jit
def add_layer_norm_forward(
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    total_ptr,  # (M, D)
    normalised_ptr,  # (M, D)
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_D)
    mask = channels < D
    offsets = tl.program_id(0).to(tl.int64) * D + channels
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    total = x.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + offsets, total, mask=mask)
    x = total.to(tl.float32)  # the rounded sum is what the backward pass will see
    centred = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    weight = tl.load(weight_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    tl.store(normalised_ptr + offsets, y.to(normalised_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_layer_norm_backward(
    grad_total_ptr,  # (M, D), read where HAS_GRAD_TOTAL
    grad_normalised_ptr,  # (M, D)
    total_ptr,  # (M, D)
    weight_ptr,  # (D,)
    grad_ptr,  # (M, D): gradient of the sum
    partial_ptr,  # (2, programs, D) float32: d weight, d bias
    M,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
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
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
        unit = centred * rstd
        grad_weight += tl.sum(dy * unit, 0)
        grad_bias += tl.sum(dy, 0)
        dunit = dy * weight
        dx = (dunit - tl.sum(dunit, 1)[:, None] / D - unit * (tl.sum(dunit * unit, 1)[:, None] / D)) * rstd
        if HAS_GRAD_TOTAL:
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
    total: torch.Tensor,
    normalised: torch.Tensor,
) -> None:
    """Fills total and normalised (M, D); everything contiguous."""
    rows, channels = x.shape
    tensors = (x, residual, weight, bias, total, normalised)
    tile = _forward_tile(channels)
    add_layer_norm_forward[(rows,)](
        *tensors, eps, D=channels, BLOCK_D=tile.columns, num_warps=tile.num_warps, num_stages=tile.num_stages
    )


def programs(rows: int, channels: int) -> int:
    """How many partial sums `backward` writes for this many rows."""
    return min(ADD_LAYER_NORM_PROGRAMS, triton.cdiv(rows, _backward_tile(channels).rows))


def backward(
    grad_total: torch.Tensor | None,
    grad_normalised: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    partial: torch.Tensor,
) -> None:
    """Fills grad (M, D), and partial (2, programs(M, D), D) float32: summed over programs, d weight and d bias."""
    rows, channels = total.shape
    tile = _backward_tile(channels)
    unread = grad_normalised if grad_total is None else grad_total
    add_layer_norm_backward[(partial.shape[1],)](
        *(unread, grad_normalised, total, weight, grad, partial, rows, eps),
        D=channels,
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        HAS_GRAD_TOTAL=grad_total is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _forward_tile(channels: int) -> Tile:
    block = triton.next_power_of_2(channels)
    return Tile(1, block, min(8, max(1, block // ADD_LAYER_NORM_CHANNELS_PER_WARP)), 1)


def _backward_tile(channels: int) -> Tile:
    block = triton.next_power_of_2(channels)
    rows = max(1, min(16, ADD_LAYER_NORM_BACKWARD_VALUES // block))
    return Tile(rows, block, 4 if rows * block <= ADD_LAYER_NORM_BACKWARD_VALUES else 8, 1)


def aot_variants() -> list[AotVariant]:
    """The widths of TiTok's S, B and L; all in bfloat16, and a float32 stream with bfloat16 branches (autocast)."""
    variants = []
    for channels in (512, 768, 1024):
        for wide, label in (("*bf16", f"bf16, D {channels}"), ("*fp32", f"fp32 + bf16, D {channels}")):
            tile = _forward_tile(channels)
            args = {"x_ptr": wide, "residual_ptr": "*bf16", "weight_ptr": wide, "bias_ptr": wide}
            args |= {"total_ptr": wide, "normalised_ptr": "*bf16", "eps": "fp32"}
            constants = {"D": channels, "BLOCK_D": tile.columns}
            launch = (tile.num_warps, tile.num_stages, label, False)
            variants.append(AotVariant(add_layer_norm_forward, args, constants, *launch))
            tile = _backward_tile(channels)
            args = {"grad_total_ptr": wide, "grad_normalised_ptr": "*bf16", "total_ptr": wide, "weight_ptr": wide}
            args |= {"grad_ptr": wide, "partial_ptr": "*fp32", "M": "i32", "eps": "fp32"}
            constants = {"D": channels, "BLOCK_M": tile.rows, "BLOCK_D": tile.columns, "HAS_GRAD_TOTAL": True}
            launch = (tile.num_warps, tile.num_stages, label, False)
            variants.append(AotVariant(add_layer_norm_backward, args, constants, *launch))
    return variants
