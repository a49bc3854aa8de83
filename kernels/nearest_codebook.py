"""Nearest codebook row: exact float32 scores tile by tile, each thread keeping the best that its lanes have met.

The score of code e for latent z is |e|^2 / 2 - z.e, half the squared distance less what all codes share. Where
latents are few, several programs search the codes of one block of latents and a second kernel picks the winner.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant
from titok.kernels._tuning import (
    NEAREST_CODEBOOK,
    NEAREST_CODEBOOK_CHANNELS,
    NEAREST_CODEBOOK_PROGRAMS,
    NEAREST_CODEBOOK_SLICED,
    Tile,
)

_REDUCE_ROWS = 128


@triton.jit
def _load_rows(ptr, rows, limit, start, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels [start, start + BLOCK_C) of some rows, zero past the edges."""
    channels = start + tl.arange(0, BLOCK_C)
    mask = rows[:, None] < limit
    if C % BLOCK_C != 0:
        mask = mask & (channels < C)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * C + channels[None, :], mask=mask, other=0.0)


@triton.jit
def nearest_codebook_search(
    latents_ptr,  # (M, C) float32. Not less: from tensors widened in here, Triton 3.7 makes TF32 dots on sm_100
    codebook_ptr,  # (V, C) float32
    out_ptr,  # (M,) int64, or (splits, M) int32 if SPLIT
    scores_ptr,  # (splits, M) float32 if SPLIT
    M,
    V,
    split_tiles,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_V)

    # Few channels: the latents stay in registers. Many: both sides are read again, a slice of channels at a time.
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
        lower = scores < best  # strictly: of equal scores the earliest stays; false for NaN
        best = tl.where(lower, scores, best)
        best_tile = tl.where(lower, tile, best_tile)

    score = tl.min(best, 1)
    candidates = tl.where(best == score[:, None], best_tile * BLOCK_V + lanes[None, :], 2147483647)
    code = tl.where(z_squares < float("inf"), tl.min(candidates, 1), 0)
    if SPLIT:
        slots = tl.program_id(1).to(tl.int64) * M + rows
        # the same score in every split leaves the choice to the first, whose code is 0
        score = tl.where(z_squares < float("inf"), score, 0.0)
        tl.store(scores_ptr + slots, score, mask=rows < M)
        tl.store(out_ptr + slots, code, mask=rows < M)
    else:
        tl.store(out_ptr + rows, code.to(tl.int64), mask=rows < M)


@triton.jit
def nearest_codebook_reduce(scores_ptr, codes_ptr, out_ptr, M, splits, BLOCK_M: tl.constexpr):
    """The best of (splits, M) winners. Splits are in the order of their codes: the first of equals is the lowest."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    best = tl.full((BLOCK_M,), float("inf"), tl.float32)
    code = tl.zeros((BLOCK_M,), tl.int32)
    slots = rows
    for _ in range(splits):
        score = tl.load(scores_ptr + slots, mask=rows < M, other=0.0)
        candidate = tl.load(codes_ptr + slots, mask=rows < M, other=0)
        lower = score < best
        best = tl.where(lower, score, best)
        code = tl.where(lower, candidate, code)
        slots += M
    tl.store(out_ptr + rows, code.to(tl.int64), mask=rows < M)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _tile(channels: int) -> Tile:
    return NEAREST_CODEBOOK if channels <= NEAREST_CODEBOOK_CHANNELS else NEAREST_CODEBOOK_SLICED


def count_splits(rows: int, codes: int, channels: int, device: torch.device) -> int:
    """Among how many programs to share the codes of one block of latents, so that few latents fill the GPU."""
    tile = _tile(channels)
    blocks = triton.cdiv(rows, tile.rows)
    wanted = triton.cdiv(NEAREST_CODEBOOK_PROGRAMS * _multiprocessors(device), blocks)
    return max(1, min(wanted, triton.cdiv(codes, tile.columns)))


def launch_nearest_codebook(
    latents: torch.Tensor,
    codebook: torch.Tensor,
    normalize: bool,
    out: torch.Tensor,
    scores: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
) -> None:
    """Writes indices of the nearest codes.

    Args:
        latents, codebook: (M, C) and (V, C) float32, contiguous.
        out: (M,) int64.
        scores, codes: (splits, M) float32 and int32, scratch where `count_splits` is above 1.
    """
    (M, C), V = latents.shape, codebook.shape[0]
    tile = _tile(C)
    splits = 1 if codes is None else codes.shape[0]
    nearest_codebook_search[(triton.cdiv(M, tile.rows), splits)](
        latents,
        codebook,
        out if codes is None else codes,
        scores,
        M,
        V,
        triton.cdiv(triton.cdiv(V, tile.columns), splits),
        **_constants(C, normalize, codes is not None),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if codes is not None:
        grid = (triton.cdiv(M, _REDUCE_ROWS),)
        nearest_codebook_reduce[grid](scores, codes, out, M, splits, BLOCK_M=_REDUCE_ROWS)


def _constants(channels: int, normalize: bool, split: bool) -> dict[str, Any]:
    return {
        "C": channels,
        "NORMALIZE": normalize,
        "SPLIT": split,
        "BLOCK_M": _tile(channels).rows,
        "BLOCK_V": _tile(channels).columns,
        "BLOCK_C": min(max(triton.next_power_of_2(channels), 16), NEAREST_CODEBOOK_CHANNELS),
    }


def aot_variants() -> list[AotVariant]:
    """The codebooks of the published tokenizers and of their proxy codes."""
    integers = {"M": "i32", "V": "i32", "split_tiles": "i32"}
    variants = []
    for channels, normalize, split in (
        (12, True, False),
        (12, True, True),
        (64, False, False),
        (256, False, False),
    ):
        tile, constants = _tile(channels), _constants(channels, normalize, split)
        signature = {
            "latents_ptr": "*fp32",
            "codebook_ptr": "*fp32",
            "out_ptr": "*i32" if split else "*i64",
            **integers,
        }
        if split:
            signature["scores_ptr"] = "*fp32"
        else:
            constants["scores_ptr"] = None
        label = f"{channels} channels" + (", l2" if normalize else "") + (", split" if split else "")
        variants.append(
            AotVariant(
                nearest_codebook_search, signature, constants, tile.num_warps, tile.num_stages, label, False
            )
        )
    reduced = {"scores_ptr": "*fp32", "codes_ptr": "*i32", "out_ptr": "*i64", "M": "i32", "splits": "i32"}
    variants.append(
        AotVariant(
            nearest_codebook_reduce,
            reduced,
            {"BLOCK_M": _REDUCE_ROWS},
            4,
            3,
            "all",
            False,
            expects_wide_loads=False,
        )
    )
    return variants
