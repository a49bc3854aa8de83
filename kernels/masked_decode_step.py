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
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta, name_of
from titok.kernels._decode import (
    FLOAT_MAX,
    LOG_UNIT,
    exp_weight,
    finite_logits,
    from_sortable,
    log_fixed,
    noisy_confidence,
    row_offset,
    smallest_keys,
    sortable,
)
from titok.kernels._launch import count_multiprocessors, launch, record

# Columns of the state of a position, as in titok/ops/masked_decode_split.py.
_COLUMNS = 13
_KIND, _TOP, _TOP_CODE, _SECOND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_FOUND, _LEFT, _LOWEST, _OWNER = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_DRAWN_SUM, _LAW_SUM, _PRODUCTS = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
_CODE, _LOGIT, _WIDTH = tl.constexpr(11), tl.constexpr(12), tl.constexpr(_COLUMNS)
_CANDIDATE, _EDITABLE = tl.constexpr(1), tl.constexpr(2)
# Columns of the numbers of a row, as in titok/ops/masked_decode_plain.py.
_SEED, _SAMPLE, _STEP, _COUNT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_TOP_K, _TOP_P, _START, _END = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_GUIDANCE, _INVERSE_TEMPERATURE, _DRAW_SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NOISE, _LIMIT, _EDIT_LIMIT = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
_INTEGERS, _FLOATS = tl.constexpr(8), tl.constexpr(6)
_TOP_P_ONE = tl.constexpr(1 << 32)
_CODE_BITS, _CODE_MASK = tl.constexpr(18), tl.constexpr((1 << 18) - 1)
_ONE = tl.constexpr(1 << 30)  # weight of the largest logit

DIGITS, DIGIT_VALUES = 8, 16  # of the sortable integer of a logit, in the search of a truncation's smallest logit
_BLOCK, _DIGIT_BLOCK, _WARPS = 1024, 256, 4
_LEAST_CHUNK, _MOST_CHUNK = 4096, 32768
_PROGRAMS = 4  # for each multiprocessor, as far as chunks of _LEAST_CHUNK codes suffice


def chunk_size(positions: int, codes: int, device: torch.device) -> int:
    """Codes of a chunk: at most 32,768, and fewer where the positions alone would not fill the GPU."""
    wanted = _PROGRAMS * count_multiprocessors(device)
    chunks = max(-(-wanted // max(positions, 1)), -(-codes // _MOST_CHUNK))
    return max(_LEAST_CHUNK, -(-codes // chunks // _LEAST_CHUNK) * _LEAST_CHUNK)


# --- Numbers


@triton.jit
def _draw_scale(floats_ptr, b):
    """0 draws greedily. The numbers come unchecked; with a scale that is not finite, all weights could be 0."""
    scale = tl.load(floats_ptr + b * _FLOATS + _DRAW_SCALE)
    return tl.where((scale >= 0.0) & (scale <= FLOAT_MAX), scale, 0.0)


@triton.jit
def _random_words(integers_ptr, b, n):
    integers_ptr += b * _INTEGERS
    sample = tl.load(integers_ptr + _SAMPLE).to(tl.uint64, bitcast=True)
    return tl.philox(
        tl.load(integers_ptr + _SEED).to(tl.uint64, bitcast=True),
        n.to(tl.uint32),
        tl.load(integers_ptr + _STEP).to(tl.uint32),
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
    )


@triton.jit
def _truncates_by_k(integers_ptr, b, codes):
    top_k = tl.load(integers_ptr + b * _INTEGERS + _TOP_K)
    return (top_k > 0) & (top_k < codes)


@triton.jit
def _truncates_by_p(integers_ptr, b):
    return tl.load(integers_ptr + b * _INTEGERS + _TOP_P) < _TOP_P_ONE


# --- Candidates


@triton.jit
def masked_decode_step_candidates(
    tokens_ptr,  # (B, N) int64
    undecided_ptr,  # (B, N) bool, or None: where the mask token is
    editable_ptr,  # (B, N) bool, or None: all decided positions
    integers_ptr,  # (B, 8) int64
    state_ptr,  # (B, N, 13) int64, written
    N,
    mask_token,
    block_length,
    EDITS: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one row."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    at = b * N + n
    if undecided_ptr is None:
        undecided = (tl.load(tokens_ptr + at, mask=inside, other=0) == mask_token) & inside
    else:
        undecided = tl.load(undecided_ptr + at, mask=inside, other=0).to(tl.int1) & inside
    start = tl.maximum(tl.load(integers_ptr + b * _INTEGERS + _START), 0)
    window = inside & (n >= start) & (n < tl.load(integers_ptr + b * _INTEGERS + _END))
    if HAS_BLOCKS:
        first = tl.min(tl.where(undecided & window, n, N), 0)
        block = (first - start) // block_length
        window = window & (n >= start + block * block_length) & (n < start + (block + 1) * block_length)
        window = window & (first < N)
    kind = tl.where(undecided & window, _CANDIDATE, 0)
    if EDITS:
        edits = window & (undecided == 0)
        if editable_ptr is not None:
            edits = edits & tl.load(editable_ptr + at, mask=inside, other=0).to(tl.int1)
        kind = tl.where(edits, _EDITABLE, kind)
    tl.store(state_ptr + at * _WIDTH + _KIND, kind.to(tl.int64), mask=inside)


# --- Partial results of a chunk


@triton.jit
def masked_decode_step_partial(
    cond_ptr,  # (B, N, V), or with rows (R, V); V codes from first_code on
    uncond_ptr,  # the same, or None
    rows_ptr,  # (B, N) int64 or None
    uncond_rows_ptr,  # (B, N) int64 or None
    integers_ptr,  # (B, 8) int64
    floats_ptr,  # (B, 6) float32
    state_ptr,  # (B, N, 13) int64
    partials_ptr,  # (B, N, C, WIDTH) int64, written where something is evaluated
    N,
    cond_stride_b,
    cond_stride_n,
    cond_row_count,
    uncond_stride_b,
    uncond_stride_n,
    uncond_row_count,
    first_code,
    first_chunk,
    all_codes,
    shift,  # of the digit, in stages "count" and "mass"
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGE: tl.constexpr,
    MODEL_LAW: tl.constexpr,
    NEEDS_LAW: tl.constexpr,
    NEEDS_PRODUCTS: tl.constexpr,
    NEEDS_SECOND: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """One program: one chunk of the codes of one position."""
    position = tl.program_id(0)
    chunk = tl.program_id(1)
    at, b, n = position.to(tl.int64), (position // N).to(tl.int64), position % N
    state_ptr += at * _WIDTH
    partials_ptr += (at * tl.num_programs(1) + chunk) * PARTIAL
    works = tl.load(state_ptr + _KIND) > 0
    draw_scale = _draw_scale(floats_ptr, b)
    if STAGE == "count":
        works = works & (draw_scale > 0.0) & _truncates_by_k(integers_ptr, b, all_codes)
    if STAGE == "mass":
        works = works & (draw_scale > 0.0) & _truncates_by_p(integers_ptr, b)
    if STAGE == "sums":
        works = works & (NEEDS_LAW | (draw_scale > 0.0))
    if STAGE == "find":
        works = works & (draw_scale > 0.0)
    if works:
        guidance = tl.load(floats_ptr + b * _FLOATS + _GUIDANCE)
        inverse_temperature = tl.load(floats_ptr + b * _FLOATS + _INVERSE_TEMPERATURE)
        cond_ptr += row_offset(rows_ptr, at, b, n, cond_row_count, cond_stride_b, cond_stride_n)
        if uncond_ptr is not None:
            uncond_ptr += row_offset(uncond_rows_ptr, at, b, n, uncond_row_count, uncond_stride_b, uncond_stride_n)
        lanes = tl.arange(0, BLOCK_V)
        begin = chunk * CHUNK
        end = tl.minimum(begin + CHUNK, V)
        # Known when the kernel is compiled wherever it may be, so that loads may be 16 bytes wide.
        bound = V if CHUNK % BLOCK_V == 0 else end
        scale = tl.where(draw_scale > 0.0, draw_scale, 1.0)
        if STAGE == "peak":
            tops = tl.full((BLOCK_V,), -float("inf"), tl.float32)
            seconds = tl.full((BLOCK_V,), -float("inf"), tl.float32)
            winners = begin + lanes
            for start in range(begin, end, BLOCK_V):
                codes = start + lanes
                y = finite_logits(cond_ptr, uncond_ptr, codes, guidance, inverse_temperature, bound) + 0.0
                if NEEDS_SECOND:
                    seconds = tl.maximum(seconds, tl.minimum(tops, y))
                winners = tl.where(y > tops, codes, winners)
                tops = tl.maximum(tops, y)
            top = tl.max(tops, 0)
            winner = tl.min(tl.where(tops == top, winners, V), 0)
            # The largest key is that of the largest logit, and of equal ones that of the lowest code.
            key = (sortable(top) << _CODE_BITS) | ((first_code + winner) ^ _CODE_MASK)
            tl.store(partials_ptr, key)
            second = tl.maximum(tl.max(tl.where(winners == winner, -float("inf"), tops), 0), tl.max(seconds, 0))
            tl.store(partials_ptr + 1, sortable(second))
        else:
            top = from_sortable(tl.load(state_ptr + _TOP))
            lowest = from_sortable(tl.load(state_ptr + _LOWEST))
        if (STAGE == "count") | (STAGE == "mass"):
            values = tl.arange(0, PARTIAL)
            found = tl.load(state_ptr + _FOUND)
            masses = tl.zeros((PARTIAL, BLOCK_V), tl.int64)
            for start in range(begin, end, BLOCK_V):
                codes = start + lanes
                y = finite_logits(cond_ptr, uncond_ptr, codes, guidance, inverse_temperature, bound) + 0.0
                if STAGE == "count":
                    mass = (codes < bound).to(tl.int64)
                else:
                    mass = tl.where(y >= lowest, exp_weight((y - top) * scale), 0)
                integer = sortable(y)
                mass = tl.where((integer >> (shift + 4)) == (found >> (shift + 4)), mass, 0)
                digit = (integer >> shift) & 15
                masses += tl.where(digit[None, :] == values[:, None], mass[None, :], 0)
            tl.store(partials_ptr + values, tl.sum(masses, 1))
        if STAGE == "sums":
            drawn = tl.zeros((BLOCK_V,), tl.int64)
            law = tl.zeros((BLOCK_V,), tl.int64)
            products = tl.zeros((BLOCK_V,), tl.int64)
            for start in range(begin, end, BLOCK_V):
                codes = start + lanes
                y = finite_logits(cond_ptr, uncond_ptr, codes, guidance, inverse_temperature, bound)
                x = (y - top) * scale
                weights = tl.where(y >= lowest, exp_weight(x), 0)
                drawn += weights
                if NEEDS_LAW:
                    if MODEL_LAW:
                        x = y - top
                        weights = exp_weight(x)
                    law += weights
                    if NEEDS_PRODUCTS:
                        x = tl.where(x > -22.0, x, -22.0)
                        products += (weights.to(tl.float32) * -x + 0.5).to(tl.int64)
            tl.store(partials_ptr, tl.sum(drawn, 0))
            tl.store(partials_ptr + 1, tl.sum(law, 0))
            tl.store(partials_ptr + 2, tl.sum(products, 0))
        if STAGE == "find":
            key = tl.full((), 0, tl.int64)  # of a chunk that does not have the code
            if tl.load(state_ptr + _OWNER) == first_chunk + chunk:
                left = tl.load(state_ptr + _LEFT)
                code = tl.full((), V, tl.int32)
                for start in range(begin, end, BLOCK_V):
                    codes = start + lanes
                    y = finite_logits(cond_ptr, uncond_ptr, codes, guidance, inverse_temperature, bound)
                    weights = tl.where(y >= lowest, exp_weight((y - top) * scale), 0)
                    code = tl.minimum(code, tl.min(tl.where(tl.cumsum(weights, 0) > left, codes, V), 0))
                    left -= tl.sum(weights, 0)  # below 0 once the code is found: later codes are larger
                y = finite_logits(cond_ptr, uncond_ptr, code, guidance, inverse_temperature, bound) + 0.0
                key = ((sortable(y) << _CODE_BITS) | (first_code + code)) + 1
            tl.store(partials_ptr, key)


# --- Reduction over the chunks


@triton.jit
def masked_decode_step_reduce(
    integers_ptr,  # (B, 8) int64
    floats_ptr,  # (B, 6) float32
    partials_ptr,  # (B, N, C, WIDTH) int64
    state_ptr,  # (B, N, 13) int64, updated
    N,
    C,
    all_codes,
    shift,
    STAGE: tl.constexpr,
    NEEDS_LAW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """One program: one position."""
    position = tl.program_id(0)
    at, b, n = position.to(tl.int64), (position // N).to(tl.int64), position % N
    state_ptr += at * _WIDTH
    partials_ptr += at * C * PARTIAL
    works = tl.load(state_ptr + _KIND) > 0
    draw_scale = _draw_scale(floats_ptr, b)
    if STAGE == "count":
        works = works & (draw_scale > 0.0) & _truncates_by_k(integers_ptr, b, all_codes)
    if STAGE == "mass":
        works = works & (draw_scale > 0.0) & _truncates_by_p(integers_ptr, b)
    if STAGE == "sums":
        works = works & (NEEDS_LAW | (draw_scale > 0.0))
    if STAGE == "find":
        works = works & (draw_scale > 0.0)
    if works:
        chunks = tl.arange(0, BLOCK_C)
        inside = chunks < C
        if STAGE == "peak":
            keys = tl.load(partials_ptr + chunks * 2, mask=inside, other=0)
            seconds = tl.load(partials_ptr + chunks * 2 + 1, mask=inside, other=0)
            key = tl.max(keys, 0)
            others = tl.where(keys == key, 0, keys >> _CODE_BITS)
            top, code = key >> _CODE_BITS, (key & _CODE_MASK) ^ _CODE_MASK
            tl.store(state_ptr + _TOP, top)
            tl.store(state_ptr + _TOP_CODE, code)
            tl.store(state_ptr + _SECOND, tl.maximum(tl.max(others, 0), tl.max(seconds, 0)))
            tl.store(state_ptr + _FOUND, 0)
            tl.store(state_ptr + _LEFT, tl.load(integers_ptr + b * _INTEGERS + _TOP_K) - 1)
            tl.store(state_ptr + _LOWEST, 0x007FFFFF)  # of -inf
            tl.store(state_ptr + _CODE, code)
            tl.store(state_ptr + _LOGIT, top)
        if (STAGE == "count") | (STAGE == "mass"):
            values = tl.arange(0, PARTIAL)
            masses = tl.zeros((PARTIAL,), tl.int64)
            for c in range(C):
                masses += tl.load(partials_ptr + c * PARTIAL + values)
            found, left = tl.load(state_ptr + _FOUND), tl.load(state_ptr + _LEFT)
            if STAGE == "mass":
                top_p = tl.load(integers_ptr + b * _INTEGERS + _TOP_P).to(tl.uint64, bitcast=True)
                total = tl.sum(masses, 0)
                if shift == 28:
                    found = tl.full((), 0, tl.int64)
                    left = tl.umulhi(top_p << 32, total.to(tl.uint64, bitcast=True)).to(tl.int64)
            above = tl.sum(masses, 0) - tl.cumsum(masses, 0)
            is_digit = (above <= left) & (left < above + masses)
            found = found | (tl.sum(tl.where(is_digit, values, 0), 0).to(tl.int64) << shift)
            left = left - tl.sum(tl.where(is_digit, above, 0), 0)
            tl.store(state_ptr + _FOUND, found)
            tl.store(state_ptr + _LEFT, left)
            if shift == 0:
                tl.store(state_ptr + _LOWEST, tl.maximum(tl.load(state_ptr + _LOWEST), found))
        if STAGE == "sums":
            drawn = tl.load(partials_ptr + chunks * 3, mask=inside, other=0)
            total = tl.sum(drawn, 0)
            high, low, _, _ = _random_words(integers_ptr, b, n)
            uniform = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
            left = tl.umulhi(uniform, total.to(tl.uint64, bitcast=True)).to(tl.int64)
            before = tl.cumsum(drawn, 0) <= left
            tl.store(state_ptr + _OWNER, tl.sum((before & inside).to(tl.int64), 0))
            tl.store(state_ptr + _LEFT, left - tl.sum(tl.where(before, drawn, 0), 0))
            tl.store(state_ptr + _DRAWN_SUM, total)
            tl.store(state_ptr + _LAW_SUM, tl.sum(tl.load(partials_ptr + chunks * 3 + 1, mask=inside, other=0), 0))
            tl.store(
                state_ptr + _PRODUCTS, tl.sum(tl.load(partials_ptr + chunks * 3 + 2, mask=inside, other=0), 0)
            )
        if STAGE == "find":
            key = tl.max(tl.load(partials_ptr + chunks, mask=inside, other=0), 0) - 1
            tl.store(state_ptr + _CODE, key & _CODE_MASK)
            tl.store(state_ptr + _LOGIT, key >> _CODE_BITS)


# --- Confidences and the policy


@triton.jit
def masked_decode_step_accept(
    tokens_ptr,  # (B, N) int64
    step_map_ptr,  # (B, N) int32 or None
    integers_ptr,  # (B, 8) int64
    floats_ptr,  # (B, 6) float32
    state_ptr,  # (B, N, 13) int64
    out_ptr,  # (B, N) int64, written; may be tokens
    confidence_ptr,  # (B, N) float32, written
    log_probability_ptr,  # (B, N) float32, written, or None
    new_step_map_ptr,  # (B, N) int32, written, or None; may be step_map
    N,
    all_codes,
    POLICY: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    MODEL_LAW: tl.constexpr,
    NEEDS_LAW: tl.constexpr,
    RENOISE: tl.constexpr,
    EDITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one row."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    at = b * N + n
    state_ptr += at * _WIDTH
    row_integers_ptr = integers_ptr + b * _INTEGERS
    row_floats_ptr = floats_ptr + b * _FLOATS
    kind = tl.load(state_ptr + _KIND, mask=inside, other=0)
    evaluated = kind > 0
    candidates = kind == _CANDIDATE
    code = tl.load(state_ptr + _CODE, mask=evaluated, other=-1)
    y = from_sortable(tl.load(state_ptr + _LOGIT, mask=evaluated, other=0x80000000))
    _, _, noise_word, uniform_word = _random_words(integers_ptr, b, n)

    raw_log_probability = tl.zeros((BLOCK_N,), tl.float32)
    log_probability, entropy, margin = raw_log_probability, raw_log_probability, raw_log_probability
    if NEEDS_LAW:
        draw_scale = _draw_scale(floats_ptr, b)
        scale = tl.where((draw_scale > 0.0) & (not MODEL_LAW), draw_scale, 1.0)
        top = from_sortable(tl.load(state_ptr + _TOP, mask=evaluated, other=0x80000000))
        total = tl.load(state_ptr + _LAW_SUM, mask=evaluated, other=1).to(tl.float32)
        log_total = log_fixed(total) - LOG_UNIT
        raw_log_probability = (y - top) * scale - log_total
        log_probability = tl.where(raw_log_probability < 0.0, raw_log_probability, 0.0)
        products = tl.load(state_ptr + _PRODUCTS, mask=evaluated, other=0).to(tl.float32)
        entropy = log_total + tl.div_rn(products, total)
        entropy = tl.where(entropy > 0.0, entropy, 0.0)
        if CONFIDENCE == "margin":
            second = from_sortable(tl.load(state_ptr + _SECOND, mask=evaluated, other=0x80000000))
            other = exp_weight((second - top) * scale)
            if not MODEL_LAW:
                lowest = from_sortable(tl.load(state_ptr + _LOWEST, mask=evaluated, other=0x80000000))
                other = tl.where(second >= lowest, other, 0)
            margin = tl.div_rn((-other + _ONE).to(tl.float32), total)
    score = tl.zeros((BLOCK_N,), tl.float32)
    if CONFIDENCE == "logit":
        score = y
    if CONFIDENCE == "log_probability":
        score = raw_log_probability
    if CONFIDENCE == "negative_entropy":
        score = -entropy
    if CONFIDENCE == "probability":
        score = exp_weight(log_probability).to(tl.float32) * 9.31322574615478515625e-10  # 2^-30
    if CONFIDENCE == "margin":
        score = margin
    confidence = noisy_confidence(score, noise_word, tl.load(row_floats_ptr + _NOISE))
    tl.store(confidence_ptr + at, tl.where(evaluated, confidence, float("inf")), mask=inside)
    if log_probability_ptr is not None:
        tl.store(log_probability_ptr + at, tl.where(evaluated, log_probability, 0.0), mask=inside)

    # Keys are distinct: a number that the policy sorts by, then the position.
    if POLICY == "count":
        order = sortable(confidence)
    elif POLICY == "entropy":
        order = (entropy * 16777216.0).to(tl.int64)
    elif POLICY == "factor":
        order = 0xFFFFFFFF - sortable(log_probability)
    elif POLICY == "leftmost":
        order = tl.zeros((BLOCK_N,), tl.int64)
    else:
        order = 0xFFFFFFFF - sortable(confidence)
    keys = (order << 12) | n
    number = tl.sum(candidates.to(tl.int64), 0)
    count = tl.maximum(tl.minimum(tl.load(row_integers_ptr + _COUNT), number), 0)
    first = candidates & (count > 0) & (keys <= smallest_keys(keys, candidates, count))
    limit = tl.load(row_floats_ptr + _LIMIT)
    accepted = candidates & (first == 0) if POLICY == "count" else first
    if POLICY == "threshold":
        accepted = accepted | (candidates & (log_probability > limit))
    if (POLICY == "entropy") | (POLICY == "factor"):
        # The largest key that is accepted, bit by bit: whether a key is depends on those up to it, monotonically.
        largest = tl.full((), 0, tl.int64)
        for i in range(44):
            tried = largest | (tl.full((), 1, tl.int64) << (43 - i))
            if POLICY == "entropy":
                fits = tl.sum(tl.where(candidates & (keys < tried), order, 0), 0) <= (limit * 16777216.0).to(
                    tl.int64
                )
            else:
                up_to = candidates & (keys <= tried)
                least = from_sortable(0xFFFFFFFF - (tl.max(tl.where(up_to, keys, 0), 0) >> 12))
                doubt = -exp_weight(tl.where(least < 0.0, least, 0.0)) + _ONE
                fits = (tl.sum(up_to.to(tl.int64), 0) + 1) * doubt < (limit * 1073741824.0).to(tl.int64)
                fits = fits | (tl.sum(up_to.to(tl.int64), 0) == 0)
            largest = tl.where(fits, tried, largest)
        accepted = accepted | (candidates & (keys <= largest))

    token = tl.load(tokens_ptr + at, mask=inside, other=0)
    if EDITS:
        is_surer = log_probability > tl.load(row_floats_ptr + _EDIT_LIMIT)
        accepted = accepted | ((kind == _EDITABLE) & (code != token) & is_surer)
    if RENOISE:
        uniform = (uniform_word.to(tl.int64) * all_codes.to(tl.int64)) >> 32
        token = tl.where(candidates, uniform, token)
    tl.store(out_ptr + at, tl.where(accepted, code, token), mask=inside)
    if step_map_ptr is not None:
        before = tl.load(step_map_ptr + at, mask=inside, other=0)
        step = tl.load(row_integers_ptr + _STEP).to(tl.int32)
        tl.store(new_step_map_ptr + at, tl.where(accepted, step, before), mask=inside)


# --- Launchers


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
