"""GroupNorm (Wu and He 2018, arXiv:1803.08494) and SiLU of channels-last maps, optionally of the sum of two maps.

    total      = x + residual                                rounded to its dtype; x itself without a residual
    z          = s * weight + bias,   s = (total - mean) * rstd,   rstd = 1 / sqrt(variance + eps)
    normalised = silu(z) = z / (1 + exp(-z))

Mean and variance are over the P pixels and the C / G channels of one group of one image. A map in memory is (B, P, C):

    one image       C channels: G groups side by side
                   +-----------------+-----------------+
    P pixels       | tile: BLOCK_P   | next tile       |      chunk: CHUNK pixels, which one program
                   |    x BLOCK_C    |                 |      of the `sums` kernels walks down
                   +-----------------+-----------------+

Forward, small maps: `one_pass`, a program keeps all pixels of BLOCK_C channels (whole groups) in registers.
Forward, large maps: `sums` writes mean and squared distances of each chunk and channel, `statistics` merges them into
mean and rstd of each group, `normalise` reads the map once more.

There are no atomics: sums are taken in an order that the shape alone decides, so the same bits come out in every
run. The backward pass is in `group_norm_silu_backward.py`; its launcher is `backward` here as well.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta, name_of
from titok.kernels._group_norm_silu import load_float32, load_statistics, tile_constexprs
from titok.kernels._launch import launch, record
from titok.kernels._tuning import (
    GROUP_NORM_SILU_CHUNKS,
    GROUP_NORM_SILU_NORMALISE,
    GROUP_NORM_SILU_ONE_PASS_VALUES,
    GROUP_NORM_SILU_PARTS,
    GROUP_NORM_SILU_SUMS,
)
from titok.kernels.group_norm_silu_backward import backward


@triton.jit
def _load_total(x_ptr, residual_ptr, total_ptr, offsets, mask):
    """A tile of x, or with a residual of the sum: rounded, stored, and as it was rounded."""
    x = load_float32(x_ptr + offsets, mask)
    if residual_ptr is not None:
        x += load_float32(residual_ptr + offsets, mask)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, total, mask=mask)
        x = total.to(tl.float32)
    return x


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def _per_channel(values, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """For each of BLOCK_C channels the sum of the values of its group."""
    sums = tl.sum(tl.reshape(values, (BLOCK_C // WIDTH, WIDTH)), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (BLOCK_C // WIDTH, WIDTH)), (BLOCK_C,))


@triton.jit
def group_norm_silu_one_pass(
    x_ptr,  # (B, P, C)
    residual_ptr,  # (B, P, C) or None
    total_ptr,  # (B, P, C), written; None without a residual
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    normalised_ptr,  # (B, P, C), written
    mean_ptr,  # (B, G), written
    rstd_ptr,  # (B, G), written
    P,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # channels in a group, a power of two
    BLOCK_P: tl.constexpr,  # at least P
    BLOCK_C: tl.constexpr,  # a multiple of WIDTH
):
    image = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = channels < C
    offsets = image * P * C + (rows[:, None] * C + channels[None, :])
    mask = (rows < P)[:, None] & inside[None, :]
    x = _load_total(x_ptr, residual_ptr, total_ptr, offsets, mask)
    size = WIDTH * tl.cast(P, tl.float32)  # P.to would fail for a P of 1, which Triton passes as a Python int
    mean = _per_channel(tl.sum(x, 0), WIDTH, BLOCK_C) / size
    centred = tl.where(mask, x - mean[None, :], 0.0)
    # A mean far from zero is rounded by much; the mean of the differences is what the rounding took off.
    rest = _per_channel(tl.sum(centred, 0), WIDTH, BLOCK_C) / size
    variance = _per_channel(tl.sum(centred * centred, 0), WIDTH, BLOCK_C) / size - rest * rest
    rstd = 1.0 / tl.sqrt_rn(tl.where(variance < 0, 0.0, variance) + eps)
    weight, bias = load_float32(weight_ptr + channels, inside), load_float32(bias_ptr + channels, inside)
    y = _silu((centred - rest[None, :]) * (rstd * weight)[None, :] + bias[None, :])
    tl.store(normalised_ptr + offsets, y.to(normalised_ptr.dtype.element_ty), mask=mask)
    is_first_of_group = inside & (channels % WIDTH == 0)
    groups = image * (C // WIDTH) + channels // WIDTH
    tl.store(mean_ptr + groups, mean + rest, mask=is_first_of_group)
    tl.store(rstd_ptr + groups, rstd, mask=is_first_of_group)


@triton.jit
def group_norm_silu_sums(
    x_ptr,  # (B, P, C)
    residual_ptr,  # (B, P, C) or None
    total_ptr,  # (B, P, C), written; None without a residual
    partial_ptr,  # (B, chunks, 2, C) float32, written: mean, sum of squared distances from it
    P,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,  # tiles that are read ahead
    IS_WHOLE: tl.constexpr,  # no tile reaches beyond the map
):
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    inside = channels < C
    first = chunk * CHUNK
    base = (image * P + first) * C
    # Distances are from the chunk's first pixel, which is one of the values: squares cancel at most CHUNK-fold.
    shift = load_float32(x_ptr + base + channels, inside)
    if residual_ptr is not None:
        shift += load_float32(residual_ptr + base + channels, inside)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(0, CHUNK, BLOCK_P, num_stages=STAGES):
        offsets = base + start * C + (rows[:, None] * C + channels[None, :])
        if IS_WHOLE:
            distance = _load_total(x_ptr, residual_ptr, total_ptr, offsets, None) - shift[None, :]
        else:
            mask = (first + start + rows < P)[:, None] & inside[None, :]
            x = _load_total(x_ptr, residual_ptr, total_ptr, offsets, mask)
            distance = tl.where(mask, x - shift[None, :], 0.0)
        sums += distance
        squares += distance * distance
    count = tl.minimum(P - first, CHUNK).to(tl.float32)
    sum_ = tl.sum(sums, 0)
    mean = sum_ / count
    partial_ptr += (image * tl.num_programs(0) + chunk) * 2 * C + channels
    tl.store(partial_ptr, shift + mean, mask=inside)
    tl.store(partial_ptr + C, tl.sum(squares, 0) - sum_ * mean, mask=inside)


@triton.jit
def group_norm_silu_statistics(
    partial_ptr,  # (B, chunks, 2, C) float32, from group_norm_silu_sums
    mean_ptr,  # (B, G), written
    rstd_ptr,  # (B, G), written
    P,
    chunks,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,  # at least WIDTH
):
    """One program: one group of one image. In float64, which may subtract squares of means and costs little here."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_W)[None, :]
    partial_ptr += image * chunks * 2 * C + group * WIDTH + columns
    sums = tl.zeros((BLOCK_CHUNKS, BLOCK_W), tl.float64)
    squares = tl.zeros((BLOCK_CHUNKS, BLOCK_W), tl.float64)
    for start in range(0, chunks, BLOCK_CHUNKS):
        rows = start + tl.arange(0, BLOCK_CHUNKS)[:, None]
        mask = (rows < chunks) & (columns < WIDTH)
        offsets = rows.to(tl.int64) * (2 * C)
        mean = tl.load(partial_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        distances = tl.load(partial_ptr + offsets + C, mask=mask, other=0.0).to(tl.float64)
        count = tl.minimum(P - rows * CHUNK, CHUNK).to(tl.float64)
        sums += count * mean
        squares += tl.where(mask, distances + count * mean * mean, 0.0)
    size = WIDTH * tl.cast(P, tl.float64)
    mean = tl.sum(tl.sum(sums, 1), 0) / size
    variance = tl.sum(tl.sum(squares, 1), 0) / size - mean * mean
    variance = tl.where(variance < 0, 0.0, variance).to(tl.float32)
    at = image * (C // WIDTH) + group
    tl.store(mean_ptr + at, mean.to(tl.float32))
    tl.store(rstd_ptr + at, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def group_norm_silu_normalise(
    total_ptr,  # (B, P, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    normalised_ptr,  # (B, P, C), written
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
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
    weight, bias = load_float32(weight_ptr + channels, inside), load_float32(bias_ptr + channels, inside)
    offsets = (image * P + first) * C + (rows[:, None] * C + channels[None, :])
    mask = (first + rows < P)[:, None] & inside[None, :]
    x = load_float32(total_ptr + offsets, mask)
    y = _silu((x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :])
    tl.store(normalised_ptr + offsets, y.to(normalised_ptr.dtype.element_ty), mask=mask)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    normalised: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fills normalised (B, C, H, W), mean and rstd (B, G) float32 and, with a residual, total (B, C, H, W).

    Maps are channels-last, weight and bias (C,) contiguous; all are float16, bfloat16 or float32. B is 1 to 65,535, the
    others at least 1. Without a residual, total is not touched.
    """
    B, C, height, width = x.shape
    P, group_width = height * width, C // num_groups
    written = None if residual is None else total
    small = _one_pass_constexprs(P, C, group_width, x.element_size())
    if small is not None:
        launch(
            group_norm_silu_one_pass,
            (triton.cdiv(C, small["BLOCK_C"]), B),
            *(x, residual, written, weight, bias, normalised, mean, rstd, P, eps),
            **small,
        )
        return
    tile = tile_constexprs(C, GROUP_NORM_SILU_SUMS)
    chunk = _chunk(P)
    chunks, columns = triton.cdiv(P, chunk), triton.cdiv(C, tile["BLOCK_C"])
    partial = torch.empty((B, chunks, 2, C), dtype=torch.float32, device=x.device)
    launch(
        group_norm_silu_sums,
        (chunks, columns, B),
        *(x, residual, written, partial, P),
        CHUNK=chunk,
        STAGES=tile["num_stages"],
        IS_WHOLE=P % chunk == 0 and C % tile["BLOCK_C"] == 0,
        **tile,
    )
    launch(
        group_norm_silu_statistics,
        (num_groups, B),
        *(partial, mean, rstd, P, chunks, eps),
        **_statistics_constexprs(C, group_width, chunk),
    )
    tile = tile_constexprs(C, GROUP_NORM_SILU_NORMALISE)
    launch(
        group_norm_silu_normalise,
        (triton.cdiv(P, tile["BLOCK_P"]), triton.cdiv(C, tile["BLOCK_C"]), B),
        *(x if residual is None else total, weight, bias, normalised, mean, rstd, P),
        WIDTH=group_width,
        **tile,
    )


def _one_pass_constexprs(P: int, C: int, group_width: int, element_size: int) -> dict[str, Any] | None:
    """Those of the one-pass kernel; None where the pixels of a group do not fit into a program's registers."""
    rows, columns = triton.next_power_of_2(P), max(group_width, 32 // element_size)  # 32 bytes: a sector of DRAM
    is_power_of_2 = group_width & (group_width - 1) == 0
    if not is_power_of_2 or rows * columns > GROUP_NORM_SILU_ONE_PASS_VALUES:
        return None
    return {
        "C": C,
        "WIDTH": group_width,
        "BLOCK_P": rows,
        "BLOCK_C": columns,
        "num_warps": max(1, min(8, rows * columns // 1024)),
        "num_stages": 1,
    }


def _chunk(P: int) -> int:
    """Pixels in a partial sum of a map of P pixels."""
    fewest, most = GROUP_NORM_SILU_CHUNKS
    return min(most, max(fewest, triton.next_power_of_2(P) // GROUP_NORM_SILU_PARTS))


def _statistics_constexprs(C: int, group_width: int, chunk: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(group_width)
    return {
        "C": C,
        "WIDTH": group_width,
        "CHUNK": chunk,
        "BLOCK_CHUNKS": max(1, 1024 // columns),
        "BLOCK_W": columns,
        "num_warps": 4,
        "num_stages": 1,
    }


def aot_variants() -> list[AotVariant]:
    """The pixel decoder's maps, in 32 groups: 128 to 512 channels at 64 x 64 pixels, and at 16 x 16 and 32 x 32."""
    variants = []
    for dtype, C in (
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.bfloat16, 512),
        (torch.float32, 256),
    ):
        statistics, parameter = meta(1, 32), meta(C)
        for side in (64, 16, 32) if C > 128 else (64,):
            x = meta(1, C, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
            with record() as launches:
                forward(x, x, 32, parameter, parameter, 1e-6, x, x, statistics, statistics)
                if side == 64:  # the others launch the same
                    backward(x, x, x, parameter, parameter, statistics, statistics, x)
            pixels = "" if side == 64 else f" {side}x{side}"
            variants += label_launches(launches, f"{name_of(dtype)} C={C}{pixels}")
    return variants
