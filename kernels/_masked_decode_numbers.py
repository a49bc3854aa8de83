"""Columns and numbers that the kernels of `masked_decode_step` share; masked_decode_step.py describes the kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from titok.kernels._decode import FLOAT_MAX

# Columns of the state of a position, as in titok/ops/masked_decode_split.py.
KIND, TOP, TOP_CODE, SECOND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FOUND, LEFT, LOWEST, OWNER = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
DRAWN_SUM, LAW_SUM, PRODUCTS = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
CODE, LOGIT, WIDTH = tl.constexpr(11), tl.constexpr(12), tl.constexpr(13)
CANDIDATE, EDITABLE = tl.constexpr(1), tl.constexpr(2)
# Columns of the numbers of a row, as in titok/ops/masked_decode_plain.py.
SEED, SAMPLE, STEP, COUNT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
TOP_K, TOP_P, START, END = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
GUIDANCE, INVERSE_TEMPERATURE, DRAW_SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NOISE, LIMIT, EDIT_LIMIT = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
INTEGERS, FLOATS = tl.constexpr(8), tl.constexpr(6)
TOP_P_ONE = tl.constexpr(1 << 32)
CODE_BITS, CODE_MASK = tl.constexpr(18), tl.constexpr((1 << 18) - 1)
ONE = tl.constexpr(1 << 30)  # weight of the largest logit


@triton.jit
def load_draw_scale(floats_ptr, b):
    """0 draws greedily. The numbers come unchecked; with a scale that is not finite, all weights could be 0."""
    scale = tl.load(floats_ptr + b * FLOATS + DRAW_SCALE)
    return tl.where((scale >= 0.0) & (scale <= FLOAT_MAX), scale, 0.0)


@triton.jit
def random_words(integers_ptr, b, n):
    integers_ptr += b * INTEGERS
    sample = tl.load(integers_ptr + SAMPLE).to(tl.uint64, bitcast=True)
    return tl.philox(
        tl.load(integers_ptr + SEED).to(tl.uint64, bitcast=True),
        n.to(tl.uint32),
        tl.load(integers_ptr + STEP).to(tl.uint32),
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
    )


@triton.jit
def truncates_by_k(integers_ptr, b, codes):
    top_k = tl.load(integers_ptr + b * INTEGERS + TOP_K)
    return (top_k > 0) & (top_k < codes)


@triton.jit
def truncates_by_p(integers_ptr, b):
    return tl.load(integers_ptr + b * INTEGERS + TOP_P) < TOP_P_ONE
