"""GroupNorm and SiLU of channels-last maps (B, P, C), P pixels, optionally of the sum of two maps.

Small maps in one pass: a program keeps all pixels of a few groups in registers. Large ones in two: programs sum
chunks of pixels channel by channel, a small kernel makes mean and rstd of them, and a third reads the map again.
Backward likewise. No atomics: sums are taken in an order that the shape alone decides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant
from titok.kernels._tuning import GROUP_NORM_SILU, GROUP_NORM_SILU_CHUNK, GROUP_NORM_SILU_ONE_PASS_VALUES


@triton.jit
def group_norm_silu_sums(
    x_ptr,  # (B, P, C)
    residual_ptr,  # (B, P, C), read where HAS_RESIDUAL
    total_ptr,  # (B, P, C), written where HAS_RESIDUAL
    partial_ptr,  # (B, chunks, 2, C) float32: mean and sum of squared distances from it
    P,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    first = chunk * CHUNK
    base = (image * P + first) * C
    # Distances are taken from the chunk's first pixel: one of the values, so that squares cancel at most CHUNK-fold.
    shift = tl.load(x_ptr + base + channels, mask=channels < C, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        shift += tl.load(residual_ptr + base + channels, mask=channels < C, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, CHUNK, BLOCK_P):
        offsets = base + start * C + (rows[:, None] * C + channels[None, :])
        mask = (first + start + rows < P)[:, None] & (channels < C)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + offsets, total, mask=mask)
            x = total.to(tl.float32)  # the rounded sum is what is normalised
        distance = tl.where(mask, x - shift[None, :], 0.0)
        sums += distance
        squares += distance * distance
    count = tl.minimum(P - first, CHUNK).to(tl.float32)
    sum_ = tl.sum(sums, 0)
    mean = sum_ / count
    partial_ptr += (image * tl.num_programs(0) + chunk) * 2 * C + channels
    tl.store(partial_ptr, shift + mean, mask=channels < C)
    tl.store(partial_ptr + C, tl.sum(squares, 0) - sum_ * mean, mask=channels < C)


@triton.jit
def group_norm_silu_statistics(
    partial_ptr,  # (B, chunks, 2, C) as written by group_norm_silu_sums
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    P,
    chunks,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # channels in a group
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,  # chunks at a time
    BLOCK_W: tl.constexpr,
):
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_W)[None, :]
    partial_ptr += image * chunks * 2 * C + group * WIDTH + columns
    # float64, for little data: squares of means far from zero may then be subtracted.
    sums = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    squares = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    for start in range(0, chunks, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)[:, None]
        mask = (rows < chunks) & (columns < WIDTH)
        offsets = rows.to(tl.int64) * (2 * C)
        mean = tl.load(partial_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        inside = tl.load(partial_ptr + offsets + C, mask=mask, other=0.0).to(tl.float64)
        count = tl.minimum(P - rows * CHUNK, CHUNK).to(tl.float64)
        sums += count * mean
        squares += tl.where(mask, inside + count * mean * mean, 0.0)
    size = WIDTH * P.to(tl.float64)
    mean = tl.sum(tl.sum(sums, 1), 0) / size
    variance = tl.sum(tl.sum(squares, 1), 0) / size - mean * mean
    variance = tl.where(variance < 0, 0.0, variance).to(tl.float32)
    at = image * (C // WIDTH) + group
    tl.store(mean_ptr + at, mean.to(tl.float32))
    tl.store(rstd_ptr + at, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def _silu_gradient(z):
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def group_norm_silu_normalise(
    x_ptr,  # (B, P, C)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    out_ptr,  # (B, P, C)
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
    groups = image * (C // WIDTH) + channels // WIDTH
    mean = tl.load(mean_ptr + groups, mask=inside, other=0.0)
    scale = tl.load(rstd_ptr + groups, mask=inside, other=0.0)
    scale *= tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    offsets = (image * P + first) * C + (rows[:, None] * C + channels[None, :])
    mask = (first + rows < P)[:, None] & inside[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = _silu((x - mean[None, :]) * scale[None, :] + bias[None, :])
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _per_channel(values, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum over its group for each of BLOCK_C channels."""
    sums = tl.sum(tl.reshape(values, (BLOCK_C // WIDTH, WIDTH)), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (BLOCK_C // WIDTH, WIDTH)), (BLOCK_C,))


@triton.jit
def group_norm_silu_one_pass(
    x_ptr,  # (B, P, C)
    residual_ptr,  # (B, P, C), read where HAS_RESIDUAL
    total_ptr,  # (B, P, C), written where HAS_RESIDUAL
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    out_ptr,  # (B, P, C)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    P,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two
    BLOCK_P: tl.constexpr,  # at least P
    BLOCK_C: tl.constexpr,  # a multiple of WIDTH
    HAS_RESIDUAL: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = channels < C
    offsets = image * P * C + (rows[:, None] * C + channels[None, :])
    mask = (rows < P)[:, None] & inside[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, total, mask=mask)
        x = total.to(tl.float32)
    size = WIDTH * P.to(tl.float32)
    mean = _per_channel(tl.sum(x, 0), WIDTH, BLOCK_C) / size
    centred = tl.where(mask, x - mean[None, :], 0.0)
    # What rounding left of the mean, far from zero, is in the mean of the differences.
    rest = _per_channel(tl.sum(centred, 0), WIDTH, BLOCK_C) / size
    variance = _per_channel(tl.sum(centred * centred, 0), WIDTH, BLOCK_C) / size - rest * rest
    rstd = 1.0 / tl.sqrt_rn(tl.where(variance < 0, 0.0, variance) + eps)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    y = _silu((centred - rest[None, :]) * (rstd * weight)[None, :] + bias[None, :])
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
    leads = inside & (channels % WIDTH == 0)
    groups = image * (C // WIDTH) + channels // WIDTH
    tl.store(mean_ptr + groups, mean + rest, mask=leads)
    tl.store(rstd_ptr + groups, rstd, mask=leads)


@triton.jit
def group_norm_silu_backward_sums(
    grad_ptr,  # (B, P, C)
    x_ptr,  # (B, P, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    partial_ptr,  # (B, chunks, 2, C) float32: sums of dz and of dz * standardised x
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
    groups = image * (C // WIDTH) + channels // WIDTH
    mean = tl.load(mean_ptr + groups, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + groups, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    first = chunk * CHUNK
    base = (image * P + first) * C
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, CHUNK, BLOCK_P):
        offsets = base + start * C + (rows[:, None] * C + channels[None, :])
        mask = (first + start + rows < P)[:, None] & inside[None, :]
        standard = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad *= _silu_gradient(standard * weight[None, :] + bias[None, :])
        sums += grad
        products += grad * standard
    partial_ptr += (image * tl.num_programs(0) + chunk) * 2 * C + channels
    tl.store(partial_ptr, tl.sum(sums, 0), mask=inside)
    tl.store(partial_ptr + C, tl.sum(products, 0), mask=inside)


@triton.jit
def group_norm_silu_backward_input(
    grad_ptr,  # (B, P, C)
    grad_sum_ptr,  # (B, P, C), read where HAS_GRAD_SUM
    x_ptr,  # (B, P, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    means_ptr,  # (B, 2, G) float32: means over a group of dz * weight and of that times standardised x
    grad_x_ptr,  # (B, P, C)
    P,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr,
):
    first, image = tl.program_id(0) * BLOCK_P, tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = channels < C
    groups = image * (C // WIDTH) + channels // WIDTH
    mean = tl.load(mean_ptr + groups, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + groups, mask=inside, other=0.0)
    means_ptr += image * 2 * (C // WIDTH) + channels // WIDTH
    mean_g = tl.load(means_ptr, mask=inside, other=0.0)
    mean_gs = tl.load(means_ptr + C // WIDTH, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    offsets = (image * P + first) * C + (rows[:, None] * C + channels[None, :])
    mask = (first + rows < P)[:, None] & inside[None, :]
    standard = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad *= _silu_gradient(standard * weight[None, :] + bias[None, :]) * weight[None, :]
    grad_x = (grad - mean_g[None, :] - standard * mean_gs[None, :]) * rstd[None, :]
    if HAS_GRAD_SUM:
        grad_x += tl.load(grad_sum_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    out: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fills out, mean and rstd, with a residual total too; maps (B, C, H, W) in channels-last memory."""
    batch, channels, height, width = x.shape
    pixels, group_width = height * width, channels // mean.shape[1]
    first = x if residual is None else residual
    small = _one_pass(pixels, channels, group_width, x.element_size())
    if small is not None:
        group_norm_silu_one_pass[(triton.cdiv(channels, small["BLOCK_C"]), batch)](
            *(x, first, total, weight, bias, out, mean, rstd, pixels, eps),
            HAS_RESIDUAL=residual is not None,
            **small,
        )
        return
    tile = _tile(channels)
    chunks = triton.cdiv(pixels, GROUP_NORM_SILU_CHUNK)
    columns = triton.cdiv(channels, tile["BLOCK_C"])
    partial = torch.empty(batch, chunks, 2, channels, dtype=torch.float32, device=x.device)
    group_norm_silu_sums[(chunks, columns, batch)](
        *(x, first, total, partial, pixels),
        CHUNK=GROUP_NORM_SILU_CHUNK,
        HAS_RESIDUAL=residual is not None,
        **tile,
    )
    group_norm_silu_statistics[(mean.shape[1], batch)](
        *(partial, mean, rstd, pixels, chunks, eps), **_statistics(channels, group_width)
    )
    group_norm_silu_normalise[(triton.cdiv(pixels, tile["BLOCK_P"]), columns, batch)](
        *(total, mean, rstd, weight, bias, out, pixels), WIDTH=group_width, **tile
    )


def backward_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> torch.Tensor:
    """(B, 2, C) float32: sums over pixels of dz, z the input of SiLU, and of dz times standardised x."""
    batch, channels, height, width = x.shape
    tile = _tile(channels)
    chunks = triton.cdiv(height * width, GROUP_NORM_SILU_CHUNK)
    partial = torch.empty(batch, chunks, 2, channels, dtype=torch.float32, device=x.device)
    group_norm_silu_backward_sums[(chunks, triton.cdiv(channels, tile["BLOCK_C"]), batch)](
        *(grad, x, weight, bias, mean, rstd, partial, height * width),
        WIDTH=channels // mean.shape[1],
        CHUNK=GROUP_NORM_SILU_CHUNK,
        **tile,
    )
    return partial.sum(1)


def backward_input(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    means: torch.Tensor,
    grad_x: torch.Tensor,
) -> None:
    """Fills grad_x from means (B, 2, G): of dz * weight and of that times standardised x, over a group."""
    batch, channels, height, width = x.shape
    tile = _tile(channels)
    grid = (triton.cdiv(height * width, tile["BLOCK_P"]), triton.cdiv(channels, tile["BLOCK_C"]), batch)
    group_norm_silu_backward_input[grid](
        *(
            grad,
            grad if grad_sum is None else grad_sum,
            x,
            weight,
            bias,
            mean,
            rstd,
            means,
            grad_x,
            height * width,
        ),
        WIDTH=channels // mean.shape[1],
        HAS_GRAD_SUM=grad_sum is not None,
        **tile,
    )


def _tile(channels: int) -> dict[str, int]:
    tile = GROUP_NORM_SILU
    columns = min(triton.next_power_of_2(channels), tile.columns)
    rows = min(tile.rows * tile.columns // columns, GROUP_NORM_SILU_CHUNK)
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {"C": channels, "BLOCK_P": rows, "BLOCK_C": columns, **launch}


def _one_pass(pixels: int, channels: int, width: int, element_size: int) -> dict[str, int] | None:
    """The launch of the one-pass kernel, or None where a group's pixels do not fit into registers."""
    rows, columns = triton.next_power_of_2(pixels), max(width, 32 // element_size)  # 32 bytes: a sector of DRAM
    if width & (width - 1) or rows * columns > GROUP_NORM_SILU_ONE_PASS_VALUES:
        return None
    warps = max(1, min(8, rows * columns // 1024))
    launch = {"num_warps": warps, "num_stages": 1}
    return {"C": channels, "WIDTH": width, "BLOCK_P": rows, "BLOCK_C": columns, **launch}


def _statistics(channels: int, width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    block = {"BLOCK_K": max(1, 1024 // columns), "BLOCK_W": columns, "num_warps": 4, "num_stages": 1}
    return {"C": channels, "WIDTH": width, "CHUNK": GROUP_NORM_SILU_CHUNK, **block}


def aot_variants() -> list[AotVariant]:
    """The pixel decoder's maps: 128, 256 and 512 channels in 32 groups, small ones of 16 and 32 pixels."""
    variants = []

    def add(kernel: Any, label: str, pointers: str, values: str, launch: dict[str, int], **constants: Any) -> None:
        maps = ("x", "residual", "total", "out", "grad", "grad_sum", "grad_x")
        half = "*bf16" if "bf16" in label else "*fp32"
        signature = {f"{p}_ptr": half if p in maps else "*fp32" for p in pointers.split()}
        signature |= {v: "fp32" if v == "eps" else "i32" for v in values.split()}
        constants |= {name: value for name, value in launch.items() if name.isupper()}
        launched = (launch["num_warps"], launch["num_stages"], label, False)
        variants.append(AotVariant(kernel, signature, constants, *launched))

    for dtype, channels in (("bf16", 128), ("bf16", 256), ("bf16", 512), ("fp32", 256)):
        label, width, tile = f"{dtype}, C {channels}", channels // 32, _tile(channels)
        chunked: dict[str, Any] = {"CHUNK": GROUP_NORM_SILU_CHUNK}
        add(group_norm_silu_sums, label, "x residual total partial", "P", tile, HAS_RESIDUAL=True, **chunked)
        add(group_norm_silu_statistics, label, "partial mean rstd", "P chunks eps", _statistics(channels, width))
        add(group_norm_silu_normalise, label, "x mean rstd weight bias out", "P", tile, WIDTH=width)
        backward = "grad x weight bias mean rstd partial"
        add(group_norm_silu_backward_sums, label, backward, "P", tile, WIDTH=width, **chunked)
        backward = "grad grad_sum x weight bias mean rstd means grad_x"
        add(group_norm_silu_backward_input, label, backward, "P", tile, WIDTH=width, HAS_GRAD_SUM=True)
        for side in (16, 32) if channels > 128 else ():
            small = _one_pass(side * side, channels, width, 2 if dtype == "bf16" else 4)
            if small is not None:
                pointers = "x residual total weight bias out mean rstd"
                add(group_norm_silu_one_pass, f"{label}, {side} px", pointers, "P eps", small, HAS_RESIDUAL=True)
    return variants
