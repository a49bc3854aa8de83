"""What the two directions of group_norm_silu share: loads and tile sizes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from titok.kernels._tuning import GROUP_NORM_SILU_CHUNKS, Tile


@triton.jit
def load_float32(ptr, mask):
    """Values as float32, 0 where masked; a mask of None reads all."""
    if mask is None:  # noqa: SIM108 (Triton would compile both branches of a conditional expression)
        values = tl.load(ptr)
    else:
        values = tl.load(ptr, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, image, channels, C: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and rstd of the group of each channel."""
    groups = image * (C // WIDTH) + channels // WIDTH
    return load_float32(mean_ptr + groups, channels < C), load_float32(rstd_ptr + groups, channels < C)


def tile_constexprs(C: int, tile: Tile) -> dict[str, Any]:
    """What a kernel that walks over a map of C channels in this tile is compiled with."""
    columns = min(triton.next_power_of_2(C), tile.columns)
    rows = min(tile.rows * tile.columns // columns, GROUP_NORM_SILU_CHUNKS[0])
    return {
        "C": C,
        "BLOCK_P": rows,
        "BLOCK_C": columns,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
