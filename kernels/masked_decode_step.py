"""One decode step of a masked or uniform-state generator, for GPUs where titok was built without nvcc.

`titok/ops/masked_decode_step.py` states the definition, in float32 and integers, and titok/ops/masked_decode_split.py
the stages and the columns of the state; csrc/masked_decode/ holds both for C++ and CUDA. The kernels here do the same
operations in the same order, so that they return the same bits.

The codes are cut into chunks. A stage has two kernels: one program for each position and chunk computes a partial
result, and one program for each position reduces the partial results of all chunks into the state of the position.
Every reduction is a maximum of integers or a sum of integers, so that the number of chunks changes no bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from titok.kernels._aot import AotVariant, label_launches, meta, name_of
from titok.kernels._launch import count_multiprocessors, launch, record
from titok.kernels._masked_decode_policy import masked_decode_step_accept, masked_decode_step_candidates
from titok.kernels._masked_decode_stages import masked_decode_step_partial, masked_decode_step_reduce

_COLUMNS = 13  # of the state of a position
_BLOCK, _DIGIT_BLOCK, _WARPS = 1024, 256, 4
_LEAST_CHUNK, _MOST_CHUNK = 4096, 32768
_PROGRAMS = 4  # for each multiprocessor, as far as chunks of _LEAST_CHUNK codes suffice


def chunk_size(positions: int, codes: int, device: torch.device) -> int:
    """Codes of a chunk: at most 32,768, and fewer where the positions alone would not fill the GPU."""
    wanted = _PROGRAMS * count_multiprocessors(device)
    chunks = max(-(-wanted // max(positions, 1)), -(-codes // _MOST_CHUNK))
    return max(_LEAST_CHUNK, -(-codes // chunks // _LEAST_CHUNK) * _LEAST_CHUNK)


class Logits(NamedTuple):
    """Logits (B, N, V), or with rows (R, V), of the codes first_code ... first_code + V - 1."""

    cond: torch.Tensor
    uncond: torch.Tensor | None
    rows: torch.Tensor | None  # (B, N) int64
    uncond_rows: torch.Tensor | None  # (B, N) int64
    first_code: int = 0
    first_chunk: int = 0


class Numbers(NamedTuple):
    """The numbers of each row and what is asked of all of them; `titok.ops.masked_decode_step` documents them."""

    integers: torch.Tensor  # (B, 8) int64
    floats: torch.Tensor  # (B, 6) float32
    codes: int  # V over all slices
    policy: str
    confidence: str
    model_law: bool
    renoise: bool
    edits: bool
    needs_law: bool
    needs_products: bool


def find_candidates(
    tokens: torch.Tensor,
    undecided: torch.Tensor | None,
    editable: torch.Tensor | None,
    numbers: Numbers,
    mask_token: int,
    block_length: int,
    state: torch.Tensor,
) -> None:
    """Writes the kinds of all positions into state (B, N, 13) int64."""
    B, N = tokens.shape
    launch(
        masked_decode_step_candidates,
        (B,),
        *(tokens, undecided, editable, numbers.integers, state, N, mask_token, max(block_length, 1)),
        EDITS=numbers.edits,
        HAS_BLOCKS=block_length > 0,
        BLOCK_N=triton.next_power_of_2(N),
        num_warps=_WARPS,
        num_stages=1,
        fp_fusion=False,
    )


def compute_partials(
    stage: str,
    shift: int,
    logits: Logits,
    numbers: Numbers,
    state: torch.Tensor,
    partials: torch.Tensor,
    chunk: int,
) -> None:
    """Fills partials (B, N, C, K) int64 for chunks of `chunk` codes each."""
    B, N = state.shape[:2]
    V = logits.cond.shape[-1]
    uncond = logits.cond if logits.uncond is None else logits.uncond
    block = _DIGIT_BLOCK if stage in ("count", "mass") else _BLOCK
    launch(
        masked_decode_step_partial,
        (B * N, partials.shape[2]),
        *(logits.cond, logits.uncond, logits.rows, None if logits.uncond is None else logits.uncond_rows),
        *(numbers.integers, numbers.floats, state, partials, N),
        *(logits.cond.stride(0), logits.cond.stride(-2), logits.cond.shape[0]),
        *(uncond.stride(0), uncond.stride(-2), uncond.shape[0]),
        *(logits.first_code, logits.first_chunk, numbers.codes, shift),
        V=V,
        CHUNK=chunk,
        STAGE=stage,
        MODEL_LAW=numbers.model_law,
        NEEDS_LAW=numbers.needs_law,
        NEEDS_PRODUCTS=numbers.needs_products,
        NEEDS_SECOND=numbers.confidence == "margin",
        BLOCK_V=min(triton.next_power_of_2(V), block),
        PARTIAL=partials.shape[3],
        num_warps=_WARPS,
        num_stages=1,
        fp_fusion=False,
    )


def reduce_partials(stage: str, shift: int, numbers: Numbers, partials: torch.Tensor, state: torch.Tensor) -> None:
    """Updates state (B, N, 13) int64 from partials (B, N, C, K) int64 of all codes."""
    B, N, C, K = partials.shape
    launch(
        masked_decode_step_reduce,
        (B * N,),
        *(numbers.integers, numbers.floats, partials, state, N, C, numbers.codes, shift),
        STAGE=stage,
        NEEDS_LAW=numbers.needs_law,
        BLOCK_C=triton.next_power_of_2(C),
        PARTIAL=K,
        num_warps=1,
        num_stages=1,
        fp_fusion=False,
    )


def accept(
    tokens: torch.Tensor,
    step_map: torch.Tensor | None,
    numbers: Numbers,
    state: torch.Tensor,
    out: torch.Tensor,
    confidences: torch.Tensor,
    log_probabilities: torch.Tensor | None,
    new_step_map: torch.Tensor | None,
) -> None:
    """Fills the results, (B, N) each, from the state after the last stage."""
    B, N = tokens.shape
    launch(
        masked_decode_step_accept,
        (B,),
        *(tokens, step_map, numbers.integers, numbers.floats, state),
        *(out, confidences, log_probabilities, new_step_map, N, numbers.codes),
        POLICY=numbers.policy,
        CONFIDENCE=numbers.confidence,
        MODEL_LAW=numbers.model_law,
        NEEDS_LAW=numbers.needs_law,
        RENOISE=numbers.renoise,
        EDITS=numbers.edits,
        BLOCK_N=triton.next_power_of_2(N),
        num_warps=_WARPS,
        num_stages=1,
        fp_fusion=False,
    )


def forward(
    tokens: torch.Tensor,
    undecided: torch.Tensor | None,
    editable: torch.Tensor | None,
    step_map: torch.Tensor | None,
    logits: Logits,
    numbers: Numbers,
    stages: Sequence[tuple[str, int, int]],
    mask_token: int,
    block_length: int,
    out: torch.Tensor,
    confidences: torch.Tensor,
    log_probabilities: torch.Tensor | None,
    new_step_map: torch.Tensor | None,
    chunk: int | None = None,
) -> None:
    """Fills the results, (B, N) each; out may be tokens, new_step_map may be step_map.

    Args:
        tokens, undecided, editable, step_map, mask_token: as of `titok.ops.masked_decode_step`. B, N and V are at least
            1; indices are contiguous, and so are the codes of a row of logits.
        stages: name, shift and width of each, of titok/ops/masked_decode_split.py.
        block_length: 0 without blocks.
        chunk: codes of a program, or None: as many as `chunk_size` says.
    """
    B, N = tokens.shape
    if chunk is None:
        chunk = chunk_size(B * N, numbers.codes, tokens.device)
    chunks = -(-numbers.codes // chunk)
    state = torch.empty((B, N, _COLUMNS), dtype=torch.int64, device=tokens.device)
    find_candidates(tokens, undecided, editable, numbers, mask_token, block_length, state)
    for name, shift, width in stages:
        partials = torch.empty((B, N, chunks, width), dtype=torch.int64, device=tokens.device)
        compute_partials(name, shift, logits, numbers, state, partials, chunk)
        reduce_partials(name, shift, numbers, partials, state)
    accept(tokens, step_map, numbers, state, out, confidences, log_probabilities, new_step_map)


def aot_variants() -> list[AotVariant]:
    """Steps of language models: 128,256 codes by threshold, 262,144 by entropy bound, 126,464 with truncation."""
    variants = []
    for dtype, N, V, policy, confidence, truncates in (
        (torch.bfloat16, 32, 128_256, "threshold", "log_probability", False),
        (torch.bfloat16, 256, 262_144, "entropy", "negative_entropy", False),
        (torch.float32, 32, 126_464, "factor", "margin", True),
    ):
        logits, tokens = meta(8, N, V, dtype=dtype), meta(8, N, dtype=torch.int64)
        rows, floats = meta(8, 8, dtype=torch.int64), meta(8, 6)
        numbers = Numbers(rows, floats, V, policy, confidence, False, False, False, True, policy == "entropy")
        digits = (("count", 28, 16), ("mass", 28, 16)) if truncates else ()
        stages = (("peak", 0, 2), *digits, ("sums", 0, 3), ("find", 0, 1))
        with record() as launches:
            forward(
                *(
                    tokens,
                    None,
                    None,
                    meta(8, N, dtype=torch.int32),
                    Logits(logits, None, None, None),
                    numbers,
                    stages,
                ),
                *(V - 1, 32, tokens, meta(8, N), meta(8, N), meta(8, N, dtype=torch.int32)),
            )
        for variant in label_launches(launches, f"{name_of(dtype)} N={N} V={V}"):
            reads_logits = variant.kernel is masked_decode_step_partial
            stage = f" {variant.constexprs['STAGE']}" if "STAGE" in variant.constexprs else ""
            wide = reads_logits and not truncates
            variants.append(dataclasses.replace(variant, label=variant.label + stage, expects_wide_loads=wide))
    return variants
