"""Index of the nearest of V codes of C channels for each of M latents, in exact float32.

The score of code e for latent z is |e|^2 / 2 - z.e: half the squared distance less |z|^2 / 2, which is the same for all
codes of a latent. `normalize` divides both by their L2 norms first, norms below 1e-12 counting as 1e-12. The lowest
index wins among equal scores. A code whose float32 sum of squares is not finite is never chosen; a latent whose sum
of squares is not finite gets index 0.

Search: a program takes BLOCK_M latents and walks over the codes in tiles of BLOCK_V. It keeps, for every latent and
every position within a tile, the best score and the tile it came from, and reduces over the positions once at the end.

                V codes ->
              +---------+---------+---------+- -
    BLOCK_M   | tile 0  | tile 1  | tile 2  |      best[i, j]      = min over tiles of score[i, tile * BLOCK_V + j]
    latents   +---------+---------+---------+- -   best_tile[i, j] = the first tile that has it
                BLOCK_V

Up to 64 channels are held whole, BLOCK_C of them (C rounded up to a power of two), and the latents stay in registers.
More channels are read in slices of 64, latents and codes alike. Where the latents alone give too few programs to fill
the GPU, the codes are split among several programs per block of latents (axis 1 of the grid), each writes its winner,
and a second kernel picks the best of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta
from titok.kernels._launch import count_multiprocessors, launch, record
from titok.kernels._tuning import (
    NEAREST_CODEBOOK,
    NEAREST_CODEBOOK_CHANNELS,
    NEAREST_CODEBOOK_PROGRAMS,
    NEAREST_CODEBOOK_REDUCE,
    NEAREST_CODEBOOK_SLICED,
    Tile,
)


@triton.jit
def _load_rows(ptr, rows, row_count, start, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels start to start + BLOCK_C of some rows of a (row_count, C) array; 0 past its edges."""
    channels = start + tl.arange(0, BLOCK_C)
    mask = rows[:, None] < row_count
    if C % BLOCK_C != 0:
        mask = mask & (channels < C)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * C + channels[None, :], mask=mask, other=0.0)


@triton.jit
def nearest_codebook_search(
    latents_ptr,  # (M, C) float32; 16-bit latents widened in here would make Triton 3.7 use TF32 products on sm_100
    codebook_ptr,  # (V, C) float32
    indices_ptr,  # written: (splits, M) int32 with scores, else (M,) int64
    scores_ptr,  # written: (splits, M) float32, the score of each index; None where one program searches all codes
    M,
    V,
    split_tiles,  # tiles of codes per program
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_V)

    z = _load_rows(latents_ptr, rows, M, 0, C, BLOCK_C)
    z_squares = tl.sum(z * z, 1)
    for start in range(BLOCK_C, C, BLOCK_C):
        z_slice = _load_rows(latents_ptr, rows, M, start, C, BLOCK_C)
        z_squares += tl.sum(z_slice * z_slice, 1)
    z_scale = 1.0 / tl.maximum(tl.sqrt_rn(z_squares), 1e-12)

    best = tl.full((BLOCK_M, BLOCK_V), float("inf"), tl.float32)
    best_tile = tl.zeros((BLOCK_M, BLOCK_V), tl.int32)
    first = tl.program_id(1) * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(V, BLOCK_V))
    for tile in range(first, last):
        codes = tile * BLOCK_V + lanes
        if C <= BLOCK_C:
            e = _load_rows(codebook_ptr, codes, V, 0, C, BLOCK_C)
            e_squares = tl.sum(e * e, 1)
            products = tl.dot(z, tl.trans(e), input_precision="ieee")
        else:
            e_squares = tl.zeros((BLOCK_V,), tl.float32)
            products = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            for start in range(0, C, BLOCK_C):
                z_slice = _load_rows(latents_ptr, rows, M, start, C, BLOCK_C)
                e = _load_rows(codebook_ptr, codes, V, start, C, BLOCK_C)
                e_squares += tl.sum(e * e, 1)
                products = tl.dot(z_slice, tl.trans(e), products, input_precision="ieee")
        usable = (e_squares < float("inf")) & (codes < V)  # false for NaN
        if NORMALIZE:
            e_scale = 1.0 / tl.maximum(tl.sqrt_rn(e_squares), 1e-12)
            e_squares *= e_scale * e_scale
            products = products * e_scale[None, :] * z_scale[:, None]
        scores = tl.where(usable[None, :], 0.5 * e_squares[None, :] - products, float("inf"))
        lower = scores < best  # strictly, so that the earliest of equal scores stays; false for NaN
        best = tl.where(lower, scores, best)
        best_tile = tl.where(lower, tile, best_tile)

    score = tl.min(best, 1)
    candidates = tl.where(best == score[:, None], best_tile * BLOCK_V + lanes[None, :], 2147483647)
    index = tl.where(z_squares < float("inf"), tl.min(candidates, 1), 0)
    if scores_ptr is not None:
        slots = tl.program_id(1).to(tl.int64) * M + rows
        # Latents that are not finite score 0 in every split: the first split wins, with index 0.
        score = tl.where(z_squares < float("inf"), score, 0.0)
        tl.store(scores_ptr + slots, score, mask=rows < M)
        tl.store(indices_ptr + slots, index, mask=rows < M)
    else:
        tl.store(indices_ptr + rows, index.to(tl.int64), mask=rows < M)


@triton.jit
def nearest_codebook_reduce(
    candidates_ptr,  # (splits, M) int32, from nearest_codebook_search
    scores_ptr,  # (splits, M) float32, from nearest_codebook_search
    indices_ptr,  # (M,) int64, written
    M,
    splits,
    BLOCK_M: tl.constexpr,
):
    """Picks the best of the splits. They are in the order of their codes, so that the first of equals is the lowest."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    best = tl.full((BLOCK_M,), float("inf"), tl.float32)
    index = tl.zeros((BLOCK_M,), tl.int32)
    slots = rows
    for _ in range(splits):
        score = tl.load(scores_ptr + slots, mask=rows < M, other=0.0)
        candidate = tl.load(candidates_ptr + slots, mask=rows < M, other=0)
        lower = score < best
        best = tl.where(lower, score, best)
        index = tl.where(lower, candidate, index)
        slots += M
    tl.store(indices_ptr + rows, index.to(tl.int64), mask=rows < M)


def forward(latents: torch.Tensor, codebook: torch.Tensor, normalize: bool, indices: torch.Tensor) -> None:
    """Fills indices (M,) int64 from latents (M, C) and codebook (V, C), both float32 and contiguous; M at least 1."""
    (M, C), V = latents.shape, codebook.shape[0]
    tile = NEAREST_CODEBOOK if C <= NEAREST_CODEBOOK_CHANNELS else NEAREST_CODEBOOK_SLICED
    blocks, tiles = triton.cdiv(M, tile.rows), triton.cdiv(V, tile.columns)
    wanted = triton.cdiv(NEAREST_CODEBOOK_PROGRAMS * count_multiprocessors(latents.device), blocks)
    splits = max(1, min(wanted, tiles))
    grid = (blocks, splits)
    numbers = (M, V, triton.cdiv(tiles, splits))
    constexprs = _constexprs(tile, C, normalize)
    if splits == 1:
        launch(nearest_codebook_search, grid, latents, codebook, indices, None, *numbers, **constexprs)
        return
    candidates = torch.empty((splits, M), dtype=torch.int32, device=latents.device)
    scores = torch.empty((splits, M), dtype=torch.float32, device=latents.device)
    launch(nearest_codebook_search, grid, latents, codebook, candidates, scores, *numbers, **constexprs)
    reduce = NEAREST_CODEBOOK_REDUCE
    launch(
        nearest_codebook_reduce,
        (triton.cdiv(M, reduce.rows),),
        *(candidates, scores, indices, M, splits),
        BLOCK_M=reduce.rows,
        num_warps=reduce.num_warps,
        num_stages=reduce.num_stages,
    )


def _constexprs(tile: Tile, C: int, normalize: bool) -> dict[str, Any]:
    return {
        "C": C,
        "NORMALIZE": normalize,
        "BLOCK_M": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_C": min(max(triton.next_power_of_2(C), 16), NEAREST_CODEBOOK_CHANNELS),  # tl.dot: no fewer than 16
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def aot_variants() -> list[AotVariant]:
    """The codebooks of the published tokenizers and of their proxy codes, and few latents, whose search is split."""
    many, few = 65_537, 33  # odd, so that the machine code is that for any number of latents
    variants = []
    for label, M, V, C, normalize in (
        ("C=12 l2", many, 4096, 12, True),
        ("C=12 l2 split", few, 4096, 12, True),
        ("C=64", many, 8192, 64, False),
        ("C=256", many, 1024, 256, False),
    ):
        with record() as launches:
            forward(meta(M, C), meta(V, C), normalize, meta(M, dtype=torch.int64))
        variants += label_launches(launches, label)
    return [
        dataclasses.replace(v, label="any C", expects_wide_loads=False)
        if v.kernel is nearest_codebook_reduce
        else v
        for v in variants
    ]
