"""exp and log as fixed sequences of float32 operations, so that every implementation gives the same bits.

Every operation is one multiplication or addition, rounded to nearest; nothing is contracted into an FMA.
csrc/common/fixed_math.h holds the same sequences for C++ and CUDA: change both or neither. The polynomials are minimax
fits of our own.
"""

from __future__ import annotations

import torch

_LOG2_E = 1.44269504
_LN2_HIGH = 0.693359375  # ten bits: a product with a small integer is exact
_LN2_LOW = -2.12194440e-4
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds a small float32 to an integer, in the low bits
_EXP = (0.00831247866, 0.0418905504, 0.166671157, 0.499992281)
_LOG = (0.0873601288, -0.14309302, 0.149183512, -0.165703073, 0.199620217, -0.250017613, 0.333339512, -0.499999911)
_SQRT_HALF_BITS = 0x3F3504F3

WEIGHT_BITS = 30
_LOWEST_EXPONENT = -22.0  # below it a weight rounds to 0 anyway; keeps 2^n normal


def exp_weight(x: torch.Tensor) -> torch.Tensor:
    """exp(x) * 2^30 rounded to an integer, int64, for float32 x <= 0 (relative error < 3e-7 and the rounding)."""
    x = x.clamp_min(_LOWEST_EXPONENT)
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = torch.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        p = p * r + coefficient
    p = (p * (r * r) + r) + 1.0
    # 2^(n + 30) from its bits: the low bits of `shifted` hold n.
    scale = ((n.to(torch.int32) + (127 + WEIGHT_BITS)) << 23).view(torch.float32)
    return (p * scale + 0.5).to(torch.int64)


def log_fixed(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive normal float32 values (relative error below 3e-7)."""
    bits = x.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    p = torch.full_like(f, _LOG[0])
    for coefficient in _LOG[1:]:
        p = p * f + coefficient
    p = p * (f * f) + e * _LN2_LOW
    return (p + f) + e * _LN2_HIGH


def gumbel(word: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 in [-2.82, 16.7], of 32-bit words (their upper 23 bits).

    u = (k + 1/2) / 2^23 is exact in float32 and strictly inside (0, 1), so both logarithms are finite.
    """
    u = ((word >> 9) * 2 + 1).to(torch.float32) * 2.0**-24
    return -log_fixed(-log_fixed(u))
