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
