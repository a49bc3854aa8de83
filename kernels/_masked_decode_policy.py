"""Kernels of `masked_decode_step` with one program for each row: the candidates before its stages, the policy after."""

from __future__ import annotations

import triton
import triton.language as tl

from titok.kernels._decode import (
    LOG_UNIT,
    exp_weight,
    from_sortable,
    log_fixed,
    noisy_confidence,
    smallest_keys,
    sortable,
)
from titok.kernels._masked_decode_numbers import (
    CANDIDATE,
    CODE,
    COUNT,
    EDIT_LIMIT,
    EDITABLE,
    END,
    FLOATS,
    INTEGERS,
    KIND,
    LAW_SUM,
    LIMIT,
    LOGIT,
    LOWEST,
    NOISE,
    ONE,
    PRODUCTS,
    SECOND,
    START,
    STEP,
    TOP,
    WIDTH,
    load_draw_scale,
    random_words,
)


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
    start = tl.maximum(tl.load(integers_ptr + b * INTEGERS + START), 0)
    window = inside & (n >= start) & (n < tl.load(integers_ptr + b * INTEGERS + END))
    if HAS_BLOCKS:
        first = tl.min(tl.where(undecided & window, n, N), 0)
        block = (first - start) // block_length
        window = window & (n >= start + block * block_length) & (n < start + (block + 1) * block_length)
        window = window & (first < N)
    kind = tl.where(undecided & window, CANDIDATE, 0)
    if EDITS:
        edits = window & (undecided == 0)
        if editable_ptr is not None:
            edits = edits & tl.load(editable_ptr + at, mask=inside, other=0).to(tl.int1)
        kind = tl.where(edits, EDITABLE, kind)
    tl.store(state_ptr + at * WIDTH + KIND, kind.to(tl.int64), mask=inside)


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
    state_ptr += at * WIDTH
    row_integers_ptr = integers_ptr + b * INTEGERS
    row_floats_ptr = floats_ptr + b * FLOATS
    kind = tl.load(state_ptr + KIND, mask=inside, other=0)
    evaluated = kind > 0
    candidates = kind == CANDIDATE
    code = tl.load(state_ptr + CODE, mask=evaluated, other=-1)
    y = from_sortable(tl.load(state_ptr + LOGIT, mask=evaluated, other=0x80000000))
    _, _, noise_word, uniform_word = random_words(integers_ptr, b, n)

    raw_log_probability = tl.zeros((BLOCK_N,), tl.float32)
    log_probability, entropy, margin = raw_log_probability, raw_log_probability, raw_log_probability
    if NEEDS_LAW:
        draw_scale = load_draw_scale(floats_ptr, b)
        scale = tl.where((draw_scale > 0.0) & (not MODEL_LAW), draw_scale, 1.0)
        top = from_sortable(tl.load(state_ptr + TOP, mask=evaluated, other=0x80000000))
        total = tl.load(state_ptr + LAW_SUM, mask=evaluated, other=1).to(tl.float32)
        log_total = log_fixed(total) - LOG_UNIT
        raw_log_probability = (y - top) * scale - log_total
        log_probability = tl.where(raw_log_probability < 0.0, raw_log_probability, 0.0)
        products = tl.load(state_ptr + PRODUCTS, mask=evaluated, other=0).to(tl.float32)
        entropy = log_total + tl.div_rn(products, total)
        entropy = tl.where(entropy > 0.0, entropy, 0.0)
        if CONFIDENCE == "margin":
            second = from_sortable(tl.load(state_ptr + SECOND, mask=evaluated, other=0x80000000))
            other = exp_weight((second - top) * scale)
            if not MODEL_LAW:
                lowest = from_sortable(tl.load(state_ptr + LOWEST, mask=evaluated, other=0x80000000))
                other = tl.where(second >= lowest, other, 0)
            margin = tl.div_rn((-other + ONE).to(tl.float32), total)
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
    confidence = noisy_confidence(score, noise_word, tl.load(row_floats_ptr + NOISE))
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
    count = tl.maximum(tl.minimum(tl.load(row_integers_ptr + COUNT), number), 0)
    first = candidates & (count > 0) & (keys <= smallest_keys(keys, candidates, count))
    limit = tl.load(row_floats_ptr + LIMIT)
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
                doubt = -exp_weight(tl.where(least < 0.0, least, 0.0)) + ONE
                fits = (tl.sum(up_to.to(tl.int64), 0) + 1) * doubt < (limit * 1073741824.0).to(tl.int64)
                fits = fits | (tl.sum(up_to.to(tl.int64), 0) == 0)
            largest = tl.where(fits, tried, largest)
        accepted = accepted | (candidates & (keys <= largest))

    token = tl.load(tokens_ptr + at, mask=inside, other=0)
    if EDITS:
        is_surer = log_probability > tl.load(row_floats_ptr + EDIT_LIMIT)
        accepted = accepted | ((kind == EDITABLE) & (code != token) & is_surer)
    if RENOISE:
        uniform = (uniform_word.to(tl.int64) * tl.cast(all_codes, tl.int64)) >> 32
        token = tl.where(candidates, uniform, token)
    tl.store(out_ptr + at, tl.where(accepted, code, token), mask=inside)
    if step_map_ptr is not None:
        before = tl.load(step_map_ptr + at, mask=inside, other=0)
        step = tl.load(row_integers_ptr + STEP).to(tl.int32)
        tl.store(new_step_map_ptr + at, tl.where(accepted, step, before), mask=inside)
