"""Tile sizes, warps and pipeline stages of every kernel, and why they are as they are.

Where no measurement is given, they were chosen from the table of resources (RESOURCES.md): no register spills on
sm_80, sm_90 and sm_100. A change here changes speed, and results only by the order of float sums.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows and columns of a program's tile, warps, and stages of the software pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# nearest_codebook. Rows are latents, columns are codes. Products are exact float32 FMAs. For every element of its tile
# a thread keeps the product, the best score and the tile of that score, so registers bound the tile.
NEAREST_CODEBOOK = Tile(64, 64, 4, 2)
NEAREST_CODEBOOK_SLICED = Tile(64, 64, 4, 1)  # for more channels than one slice: a second stage would spill
NEAREST_CODEBOOK_CHANNELS = 64  # in one slice
NEAREST_CODEBOOK_PROGRAMS = 4  # per multiprocessor: codes are split among programs until there are as many
NEAREST_CODEBOOK_REDUCE = Tile(128, 1, 4, 3)

# code_mixture. Rows are rows of logits, columns are codes; the key is the number of bytes per logit. 16-bit products
# run on tensor cores, float32 ones as exact FMAs, which need smaller tiles. Two or more programs fit a multiprocessor.
CODE_MIXTURE_FORWARD = {2: Tile(64, 64, 4, 2), 4: Tile(32, 32, 8, 2)}
CODE_MIXTURE_DLOGITS = {2: Tile(64, 64, 4, 2), 4: Tile(32, 32, 8, 2)}
CODE_MIXTURE_DCODEBOOK = {2: Tile(64, 64, 4, 2), 4: Tile(16, 32, 4, 2)}
# The gradient of the codebook is summed in parts of at least so many rows, and in at most so many parts: 1,024 codes
# are 16 tiles of 64, and 16 * 8 programs are about one for each of the 132 multiprocessors of an H100.
CODE_MIXTURE_ROWS_PER_SPLIT = 256
CODE_MIXTURE_SPLITS = 8

# add_layer_norm. A row of up to 1,024 channels has one warp, which reduces it without a barrier.
ADD_LAYER_NORM_CHANNELS_PER_WARP = 1024
ADD_LAYER_NORM_BACKWARD_VALUES = 4096  # in a program's block of rows
ADD_LAYER_NORM_PROGRAMS = 512  # of the backward pass at most: each writes a partial sum

# group_norm_silu. Rows are pixels, columns are channels. With 2,048 values in a tile, a thread's share of the tile and
# of its two sums stays below 128 registers. 128 channels are 256 bytes of a pixel or more, read in one go. H200,
# 2026-11-26, maps of 32 x 512 x 512 x 128 in bfloat16: sums with a residual 4.26 TB/s with 3 tiles read ahead, 3.73
# without; a normalising program of 64 pixels 4.17 TB/s, of 16 pixels 4.10; a copy 4.25.
GROUP_NORM_SILU_SUMS = Tile(16, 128, 4, 3)
GROUP_NORM_SILU_NORMALISE = Tile(64, 128, 8, 1)
GROUP_NORM_SILU_BACKWARD = Tile(16, 128, 4, 2)
# Pixels in a partial sum: the map's divided by so many parts, within these bounds. Without a residual, sums ran at
# 3.46 TB/s with 256 pixels in each and at 2.49 with 128, since each program ends by adding up what its threads hold.
GROUP_NORM_SILU_PARTS = 128
GROUP_NORM_SILU_CHUNKS = (128, 512)
GROUP_NORM_SILU_BACKWARD_CHUNK = 128
GROUP_NORM_SILU_ONE_PASS_VALUES = 16384  # of a map that one program of 8 warps can hold in registers

# masked_attention. Rows are queries, columns are keys. The key of each table is (bytes per element, head dim rounded up
# to a power of two and at least 64).
# One kernel spills, in a form that no preset uses: the gradient of the queries in float32 for more than 64 channels a
# head. Its two operands of 16 x 128 values, split for three TF32 products, exceed a thread's registers (about 350
# spills on sm_90).
# 289 to 385 tokens are walked over in blocks. Programs that hold all keys could take 32 queries at once without spills,
# and would read keys and values twice as often as these, which take 64.
# `WHOLE`: (most columns, tile of the kernel that holds all keys; 0 stands for all keys), the first that fits is used.
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

# maskgit_decode_step. Columns are codes. A block of 1,024 leaves eight codes to a thread, with their 64-bit sums.
MASKGIT_DECODE_STEP_DRAW = Tile(1, 1024, 4, 1)
MASKGIT_DECODE_STEP_SELECT_WARPS = 4

# linear_gelu and linear_add_norm. Rows are rows of x, columns are outputs. Tiles of 64 x 64 make 36 programs of the
# smallest product of a generator at batch 1 (130 rows, 768 outputs), where tiles of 128 x 128 would make 12.
LINEAR = Tile(64, 64, 4, 3)
# H200, 2026-11-26, 768 inputs and 3,072 outputs in bfloat16, against cuBLAS and PyTorch's GELU: 9.1 and 11.1 us for 66
# rows, 10.5 and 10.6 for 130 (64 x 64: 9.7 and 10.5); for 8,320 rows 107 at best and 102.
LINEAR_GELU = Tile(64, 32, 4, 6)
GELU = Tile(1, 4096, 4, 1)
LINEAR_DEPTH = 64  # inputs in one step of the loop
LINEAR_NORM_VALUES = 4096  # that a program normalises at once

# place_windows. Rows are pixels, columns are channels. H200, 2026-11-26: 3.8 to 4.1 TB/s, PyTorch's sum 1.3.
PLACE_WINDOWS = Tile(8, 512, 4, 1)
