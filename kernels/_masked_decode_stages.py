"""Kernels of the stages of `masked_decode_step`: partial results of chunks, and their reduction."""

from __future__ import annotations

import triton
import triton.language as tl

from titok.kernels._decode import exp_weight, finite_logits, from_sortable, row_offset, sortable
from titok.kernels._masked_decode_numbers import (
    CODE,
    CODE_BITS,
    CODE_MASK,
    DRAWN_SUM,
    FLOATS,
    FOUND,
    GUIDANCE,
    INTEGERS,
    INVERSE_TEMPERATURE,
    KIND,
    LAW_SUM,
    LEFT,
    LOGIT,
    LOWEST,
    OWNER,
    PRODUCTS,
    SECOND,
    TOP,
    TOP_CODE,
    TOP_K,
    TOP_P,
    WIDTH,
    load_draw_scale,
    random_words,
    truncates_by_k,
    truncates_by_p,
)


@triton.jit
def _works(
    state_ptr,  # (13,) int64, of one position
    integers_ptr,  # (B, 8) int64
    b,
    draw_scale,
    all_codes,
    STAGE: tl.constexpr,
    NEEDS_LAW: tl.constexpr,
):
    """Whether a position of row b has something to do in a stage."""
    works = tl.load(state_ptr + KIND) > 0
    if STAGE == "count":
        works = works & (draw_scale > 0.0) & truncates_by_k(integers_ptr, b, all_codes)
    if STAGE == "mass":
        works = works & (draw_scale > 0.0) & truncates_by_p(integers_ptr, b)
    if STAGE == "sums":
        works = works & (NEEDS_LAW | (draw_scale > 0.0))
    if STAGE == "find":
        works = works & (draw_scale > 0.0)
    return works


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
    state_ptr += at * WIDTH
    partials_ptr += (at * tl.num_programs(1) + chunk) * PARTIAL
    draw_scale = load_draw_scale(floats_ptr, b)
    if _works(state_ptr, integers_ptr, b, draw_scale, all_codes, STAGE, NEEDS_LAW):
        guidance = tl.load(floats_ptr + b * FLOATS + GUIDANCE)
        inverse_temperature = tl.load(floats_ptr + b * FLOATS + INVERSE_TEMPERATURE)
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
            key = (sortable(top) << CODE_BITS) | ((first_code + winner) ^ CODE_MASK)
            tl.store(partials_ptr, key)
            second = tl.maximum(tl.max(tl.where(winners == winner, -float("inf"), tops), 0), tl.max(seconds, 0))
            tl.store(partials_ptr + 1, sortable(second))
        else:
            top = from_sortable(tl.load(state_ptr + TOP))
            lowest = from_sortable(tl.load(state_ptr + LOWEST))
        if (STAGE == "count") | (STAGE == "mass"):
            values = tl.arange(0, PARTIAL)
            found = tl.load(state_ptr + FOUND)
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
            if tl.load(state_ptr + OWNER) == first_chunk + chunk:
                left = tl.load(state_ptr + LEFT)
                code = tl.full((), V, tl.int32)
                for start in range(begin, end, BLOCK_V):
                    codes = start + lanes
                    y = finite_logits(cond_ptr, uncond_ptr, codes, guidance, inverse_temperature, bound)
                    weights = tl.where(y >= lowest, exp_weight((y - top) * scale), 0)
                    code = tl.minimum(code, tl.min(tl.where(tl.cumsum(weights, 0) > left, codes, V), 0))
                    left -= tl.sum(weights, 0)  # below 0 once the code is found: later codes are larger
                y = finite_logits(cond_ptr, uncond_ptr, code, guidance, inverse_temperature, bound) + 0.0
                key = ((sortable(y) << CODE_BITS) | (first_code + code)) + 1
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
    state_ptr += at * WIDTH
    partials_ptr += at * C * PARTIAL
    draw_scale = load_draw_scale(floats_ptr, b)
    if _works(state_ptr, integers_ptr, b, draw_scale, all_codes, STAGE, NEEDS_LAW):
        chunks = tl.arange(0, BLOCK_C)
        inside = chunks < C
        if STAGE == "peak":
            keys = tl.load(partials_ptr + chunks * 2, mask=inside, other=0)
            seconds = tl.load(partials_ptr + chunks * 2 + 1, mask=inside, other=0)
            key = tl.max(keys, 0)
            others = tl.where(keys == key, 0, keys >> CODE_BITS)
            top, code = key >> CODE_BITS, (key & CODE_MASK) ^ CODE_MASK
            tl.store(state_ptr + TOP, top)
            tl.store(state_ptr + TOP_CODE, code)
            tl.store(state_ptr + SECOND, tl.maximum(tl.max(others, 0), tl.max(seconds, 0)))
            tl.store(state_ptr + FOUND, 0)
            tl.store(state_ptr + LEFT, tl.load(integers_ptr + b * INTEGERS + TOP_K) - 1)
            tl.store(state_ptr + LOWEST, 0x007FFFFF)  # of -inf
            tl.store(state_ptr + CODE, code)
            tl.store(state_ptr + LOGIT, top)
        if (STAGE == "count") | (STAGE == "mass"):
            values = tl.arange(0, PARTIAL)
            masses = tl.zeros((PARTIAL,), tl.int64)
            for c in range(C):
                masses += tl.load(partials_ptr + c * PARTIAL + values)
            found, left = tl.load(state_ptr + FOUND), tl.load(state_ptr + LEFT)
            if STAGE == "mass":
                top_p = tl.load(integers_ptr + b * INTEGERS + TOP_P).to(tl.uint64, bitcast=True)
                total = tl.sum(masses, 0)
                if shift == 28:
                    found = tl.full((), 0, tl.int64)
                    left = tl.umulhi(top_p << 32, total.to(tl.uint64, bitcast=True)).to(tl.int64)
            above = tl.sum(masses, 0) - tl.cumsum(masses, 0)
            is_digit = (above <= left) & (left < above + masses)
            found = found | (tl.sum(tl.where(is_digit, values, 0), 0).to(tl.int64) << shift)
            left = left - tl.sum(tl.where(is_digit, above, 0), 0)
            tl.store(state_ptr + FOUND, found)
            tl.store(state_ptr + LEFT, left)
            if shift == 0:
                tl.store(state_ptr + LOWEST, tl.maximum(tl.load(state_ptr + LOWEST), found))
        if STAGE == "sums":
            drawn = tl.load(partials_ptr + chunks * 3, mask=inside, other=0)
            total = tl.sum(drawn, 0)
            high, low, _, _ = random_words(integers_ptr, b, n)
            uniform = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
            left = tl.umulhi(uniform, total.to(tl.uint64, bitcast=True)).to(tl.int64)
            before = tl.cumsum(drawn, 0) <= left
            tl.store(state_ptr + OWNER, tl.sum((before & inside).to(tl.int64), 0))
            tl.store(state_ptr + LEFT, left - tl.sum(tl.where(before, drawn, 0), 0))
            tl.store(state_ptr + DRAWN_SUM, total)
            tl.store(state_ptr + LAW_SUM, tl.sum(tl.load(partials_ptr + chunks * 3 + 1, mask=inside, other=0), 0))
            tl.store(state_ptr + PRODUCTS, tl.sum(tl.load(partials_ptr + chunks * 3 + 2, mask=inside, other=0), 0))
        if STAGE == "find":
            key = tl.max(tl.load(partials_ptr + chunks, mask=inside, other=0), 0) - 1
            tl.store(state_ptr + CODE, key & CODE_MASK)
            tl.store(state_ptr + LOGIT, key >> CODE_BITS)
