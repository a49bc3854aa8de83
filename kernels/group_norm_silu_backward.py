"""Backward of group_norm_silu, in the notation and the memory layout of its forward pass.

With g = d loss / d z = grad * silu'(z), sums over images and pixels, and means over a group of one image:

    d weight = sum(g * s),   d bias = sum(g)
    d x = d residual = rstd * (g * weight - mean(g * weight) - s * mean(g * weight * s)) + grad_total

`backward_sums` adds g and g * s over chunks of pixels, PyTorch adds up the chunks and makes the group means of them,
and `backward_input` reads the map once more and writes d x. No atomics: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from titok.kernels._group_norm_silu import load_float32, load_statistics, tile_constexprs
from titok.kernels._launch import launch
from titok.kernels._tuning import GROUP_NORM_SILU_BACKWARD, GROUP_NORM_SILU_BACKWARD_CHUNK


@triton.jit
def _silu_gradient(z):
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def group_norm_silu_backward_sums(
    grad_ptr,  # (B, P, C)
    x_ptr,  # (B, P, C): what was normalised
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    partial_ptr,  # (B, chunks, 2, C) float32, written: sums of g and of g * s
    P,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = channels < C
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, image, channels, C, WIDTH)
    weight, bias = load_float32(weight_ptr + channels, inside), load_float32(bias_ptr + channels, inside)
    first = chunk * CHUNK
    base = (image * P + first) * C
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, CHUNK, BLOCK_P):
        offsets = base + start * C + (rows[:, None] * C + channels[None, :])
        mask = (first + start + rows < P)[:, None] & inside[None, :]
        s = (load_float32(x_ptr + offsets, mask) - mean[None, :]) * rstd[None, :]
        g = load_float32(grad_ptr + offsets, mask) * _silu_gradient(s * weight[None, :] + bias[None, :])
        sums += g
        products += g * s
    partial_ptr += (image * tl.num_programs(0) + chunk) * 2 * C + channels
    tl.store(partial_ptr, tl.sum(sums, 0), mask=inside)
    tl.store(partial_ptr + C, tl.sum(products, 0), mask=inside)


@triton.jit
def group_norm_silu_backward_input(
    grad_ptr,  # (B, P, C)
    grad_total_ptr,  # (B, P, C) or None
    x_ptr,  # (B, P, C): what was normalised
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    group_means_ptr,  # (B, 2, G) float32: means over a group of g * weight and of g * weight * s
    grad_x_ptr,  # (B, P, C), written
    P,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first, image = tl.program_id(0) * BLOCK_P, tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = channels < C
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, image, channels, C, WIDTH)
    group_means_ptr += image * 2 * (C // WIDTH) + channels // WIDTH
    mean_g, mean_gs = load_float32(group_means_ptr, inside), load_float32(group_means_ptr + C // WIDTH, inside)
    weight, bias = load_float32(weight_ptr + channels, inside), load_float32(bias_ptr + channels, inside)
    offsets = (image * P + first) * C + (rows[:, None] * C + channels[None, :])
    mask = (first + rows < P)[:, None] & inside[None, :]
    s = (load_float32(x_ptr + offsets, mask) - mean[None, :]) * rstd[None, :]
    g = load_float32(grad_ptr + offsets, mask) * (
        _silu_gradient(s * weight[None, :] + bias[None, :]) * weight[None, :]
    )
    grad_x = (g - mean_g[None, :] - s * mean_gs[None, :]) * rstd[None, :]
    if grad_total_ptr is not None:
        grad_x += load_float32(grad_total_ptr + offsets, mask)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    grad_x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills grad_x (B, C, H, W), the gradient of x and of a residual; returns those of weight and bias, (C,) float32.

    grad, grad_total, x and grad_x are channels-last; x is what was normalised: the sum, where there was a residual.
    mean and rstd (B, G) are those of the forward pass, weight and bias (C,) contiguous.
    """
    B, C, height, width = x.shape
    P, num_groups = height * width, mean.shape[1]
    tile = tile_constexprs(C, GROUP_NORM_SILU_BACKWARD) | {"WIDTH": C // num_groups}
    chunks, columns = triton.cdiv(P, GROUP_NORM_SILU_BACKWARD_CHUNK), triton.cdiv(C, tile["BLOCK_C"])
    partial = torch.empty((B, chunks, 2, C), dtype=torch.float32, device=x.device)
    launch(
        group_norm_silu_backward_sums,
        (chunks, columns, B),
        *(grad, x, weight, bias, mean, rstd, partial, P),
        CHUNK=GROUP_NORM_SILU_BACKWARD_CHUNK,
        **tile,
    )
    sums = partial.sum(1)
    group_sums = (sums * weight.to(sums.dtype)).unflatten(2, (num_groups, -1)).sum(3)
    group_means = group_sums / (C // num_groups * P)
    launch(
        group_norm_silu_backward_input,
        (triton.cdiv(P, tile["BLOCK_P"]), columns, B),
        *(grad, grad_total, x, weight, bias, mean, rstd, group_means, grad_x, P),
        **tile,
    )
    return sums[:, 1].sum(0), sums[:, 0].sum(0)
