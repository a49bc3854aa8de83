"""What the kernels of both decode steps share: fixed-point exp and log, noise, finite logits, sortable integers.

The same operations in the same order as csrc/common/fixed_math.h and titok/ops/fixed_math.py, so that all back ends
give the same bits. Kernels that use them are compiled with `fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
LOG_UNIT = tl.constexpr(20.7944154167983592)  # ln(2^30)


@triton.jit
def exp_weight(x):
    """exp(x) * 2^30 rounded to an integer, int64, for float32 x <= 0."""
    x = tl.where(x > -22.0, x, -22.0)
    shifted = x * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 0.00831247866 + 0.0418905504
    p = p * r + 0.166671157
    p = p * r + 0.499992281
    p = (p * (r * r) + r) + 1.0
    # 2^(n + 30): the low bits of `shifted` hold n, above those of 12582912.
    scale = ((shifted.to(tl.int32, bitcast=True) + (127 + 30 - 0x4B400000)) << 23).to(tl.float32, bitcast=True)
    return (p * scale + 0.5).to(tl.int64)


@triton.jit
def log_fixed(x):
    """Natural logarithm of a positive normal float32."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = f * 0.0873601288 + -0.14309302
    p = p * f + 0.149183512
    p = p * f + -0.165703073
    p = p * f + 0.199620217
    p = p * f + -0.250017613
    p = p * f + 0.333339512
    p = p * f + -0.499999911
    p = p * (f * f) + e * -2.12194440e-4
    return (p + f) + e * 0.693359375


@triton.jit
def noisy_confidence(score, word, noise):
    """The score and noise times the Gumbel noise of a random word. The last addition turns -0 into +0."""
    u = ((word >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8
    gumbel = -log_fixed(-log_fixed(u))
    return (score + gumbel * noise) + 0.0


@triton.jit
def row_offset(rows_ptr, at, b, n, row_count, stride_b, stride_n):
    """Where the logits of a position begin. Row numbers come unchecked and are clamped."""
    if rows_ptr is None:
        offset = b * stride_b + n * stride_n
    else:
        row = tl.minimum(tl.load(rows_ptr + at), row_count - 1)
        offset = tl.maximum(row, 0) * stride_n
    return offset


@triton.jit
def finite_logits(cond_ptr, uncond_ptr, codes, guidance, inverse_temperature, end):
    """Guided logits times the inverse temperature, float32 and finite; -inf from code `end` on."""
    logits = tl.load(cond_ptr + codes, mask=codes < end, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        base = tl.load(uncond_ptr + codes, mask=codes < end, other=0.0).to(tl.float32)
        logits = tl.where(guidance == 1.0, logits, base + (logits - base) * guidance)
    y = logits * inverse_temperature
    y = tl.where(y > -FLOAT_MAX, y, -FLOAT_MAX)
    y = tl.where(y < FLOAT_MAX, y, FLOAT_MAX)
    return tl.where(codes < end, y, -float("inf"))


@triton.jit
def sortable(x):
    """An integer in [0, 2^32), int64, that sorts like the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def from_sortable(integer):
    """The float32 that `sortable` turned into this integer."""
    bits = tl.where(integer >= 2147483648, integer - 2147483648, -1 - integer)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def smallest_keys(keys, valid, rank):
    """The largest of the `rank` smallest valid keys: distinct int64 in [0, 2^44). Meaningless where rank is 0."""
    limit = tl.full((), 0, tl.int64)
    for i in range(44):
        bit = 43 - i
        below = tl.sum((valid & ((keys >> bit) == (limit >> bit))).to(tl.int64), 0)  # whose bit is 0
        is_set = rank > below
        rank = tl.where(is_set, rank - below, rank)
        limit = tl.where(is_set, limit | (tl.full((), 1, tl.int64) << bit), limit)
    return limit
