"""Tile sizes, warps and pipeline stages of every kernel, in one place, with where they were measured.

A change here changes speed only: no result depends on it but in the order of float sums.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A kernel's launch: rows and columns of its tile, warps, software-pipeline stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# nearest_codebook: not yet measured. Exact float32 FMAs; each thread keeps a score, the best score and its tile for
# every element, which bounds the tile. From the resource table: no spills. Columns are codes.
NEAREST_CODEBOOK = Tile(64, 64, 4, 2)
NEAREST_CODEBOOK_SLICED = Tile(64, 64, 4, 1)  # more channels than a slice: prefetching as well would spill
NEAREST_CODEBOOK_CHANNELS = 64  # in a slice
NEAREST_CODEBOOK_PROGRAMS = 4  # per multiprocessor that splitting the codes aims at when latents are few

# code_mixture: not yet measured. Chosen from the resource table: no spills, two programs or more on an SM.
# 16-bit dots run on tensor cores, float32 ones as exact FMAs, which need smaller tiles.
CODE_MIXTURE_FORWARD = {2: Tile(64, 64, 4, 2), 4: Tile(32, 32, 8, 2)}  # by bytes per logit; columns are codes
CODE_MIXTURE_DLOGITS = {2: Tile(64, 64, 4, 2), 4: Tile(32, 32, 8, 2)}
CODE_MIXTURE_DCODEBOOK = {2: Tile(64, 64, 4, 2), 4: Tile(16, 32, 4, 2)}
CODE_MIXTURE_SPLITS = 8  # of the rows in d codebook: 16 tiles of codes times 8 fill 132 SMs once

# add_layer_norm: not yet measured. Rows to 1,024 channels fit one warp, which then needs no barrier to reduce them.
ADD_LAYER_NORM_CHANNELS_PER_WARP = 1024
ADD_LAYER_NORM_BACKWARD_VALUES = 4096  # in a tile of whole rows
ADD_LAYER_NORM_PROGRAMS = 512  # of the backward pass, each with its own partial d weight and d bias

# group_norm_silu: not yet measured. Rows are pixels. 2,048 values leave a thread's share of a tile and of its two sums
# under 128 registers; 128 channels make a row of a tile 256 bytes or more.
GROUP_NORM_SILU = Tile(16, 128, 4, 2)
GROUP_NORM_SILU_CHUNK = 128  # pixels to a partial sum: 32 programs for one 64 x 64 map, 512 for one 256 x 256
GROUP_NORM_SILU_ONE_PASS_VALUES = 16384  # of a map that a program of 8 warps keeps in registers

# masked_attention: not yet measured. Chosen from the resource table: no spills on sm_80, sm_90 and sm_100, but for one
# kernel that no preset uses: the queries' gradient in float32 for heads of more than 64 channels, whose two operands
# of 16 x 128 values, split in three-pass products, are more than a thread's registers (about 350 spills on sm_90).
# Rows are queries, columns keys; 0 columns: all of them, up to the number before the tile.
# 289 to 385 tokens go over blocks: without spills on all three, programs that hold all keys would have 32 queries, and
# read keys and values twice as often as those of 64.
# By (bytes per element, head dim as a power of two, at least 64).
MASKED_ATTENTION_FORWARD_WHOLE = {
    (2, 64): ((160, Tile(64, 0, 4, 1)),),
    (2, 128): ((160, Tile(64, 0, 4, 1)),),
    (4, 64): ((48, Tile(32, 0, 4, 1)),),
    (4, 128): (),
}
MASKED_ATTENTION_FORWARD = {
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(64, 64, 8, 2),
    (4, 64): Tile(16, 32, 4, 2),
    (4, 128): Tile(16, 32, 8, 2),
}
MASKED_ATTENTION_BACKWARD_WHOLE = {
    (2, 64): ((80, Tile(32, 0, 4, 1)), (144, Tile(16, 0, 8, 1))),
    (2, 128): ((80, Tile(32, 0, 8, 1)),),
    (4, 64): (),
    (4, 128): (),
}
MASKED_ATTENTION_BACKWARD_QUERIES = {
    (2, 64): Tile(64, 64, 4, 2),
    (2, 128): Tile(32, 32, 4, 2),
    (4, 64): Tile(16, 32, 8, 1),
    (4, 128): Tile(16, 32, 8, 1),
}
MASKED_ATTENTION_BACKWARD_KEYS = {
    (2, 64): Tile(32, 64, 4, 2),
    (2, 128): Tile(32, 64, 8, 2),
    (4, 64): Tile(32, 32, 4, 1),
    (4, 128): Tile(16, 16, 8, 1),
}
