// exp and log as fixed sequences of float32 multiplications and additions.
//
// The build forbids the compilers to fuse a multiplication and an addition (-ffp-contract=off, -fmad=false), so
// every compiler, instruction set and GPU returns the same bits. titok/ops/fixed_math.py does the same operations
// in PyTorch: change both or neither. Templates take F = float or, on the CPU, a GCC vector of floats.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace titok {

constexpr int kWeightBits = 30;
constexpr float kLowestExponent = -22.0f;         // exp(-22) * 2^30 rounds to 0, and 2^n stays a normal number
constexpr float kLogUnit = 20.7944154167983592f;  // ln(2^30)
constexpr float kLn2High = 0.693359375f;    // ln 2 to ten bits, so that its product with a small integer is exact
constexpr float kLn2Low = -2.12194440e-4f;  // ln 2 - kLn2High

// exp(x) * 2^30 rounded to an integer, for x <= 0, -inf included.
//
// x = n ln 2 + r with an integer n and |r| <= ln 2 / 2; exp(r) is a polynomial of degree 5 (Cody and Waite's
// reduction).
template <class F>
TITOK_HD typename Lanes<F>::Int exp_weight(F x) {
  using Int = typename Lanes<F>::Int;
  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold.
  constexpr float kRound = 12582912.0f;
  const F lowest = F{} + kLowestExponent;
  x = Lanes<F>::larger(x, lowest);
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  // Both fused products are exact, so that fusing changes no bit.
  const F r = Lanes<F>::fuse(n, F{} - kLn2High, x) - n * kLn2Low;
  F p = r * 0.00831247866f + 0.0418905504f;
  p = p * r + 0.166671157f;
  p = p * r + 0.499992281f;
  p = (p * (r * r) + r) + 1.0f;
  // 2^(n + 30). The bits of kRound are subtracted from those of the sum, because a signed shift must not overflow.
  constexpr int32_t kRoundBits = 0x4B400000;
  const F scale = bit_cast<F>(Int((bit_cast<Int>(shifted) + (127 + kWeightBits - kRoundBits)) << 23));
  return Lanes<F>::truncate(Lanes<F>::fuse(p, scale, F{} + 0.5f));
}

// Natural logarithm of a positive normal float: x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and a
// polynomial of degree 8 in f.
TITOK_HD float log_fixed(float x) {
  constexpr int32_t kSqrtHalf = 0x3F3504F3;  // bits of sqrt(1/2)
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - kSqrtHalf) >> 23;
  const float f = bit_cast<float>(bits - exponent * (1 << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  float p = f * 0.0873601288f + -0.14309302f;
  p = p * f + 0.149183512f;
  p = p * f + -0.165703073f;
  p = p * f + 0.199620217f;
  p = p * f + -0.250017613f;
  p = p * f + 0.333339512f;
  p = p * f + -0.499999911f;
  p = p * (f * f) + e * kLn2Low;
  return (p + f) + e * kLn2High;
}

// Standard Gumbel noise from the upper 23 bits k of a random word: u = (k + 1/2) / 2^23 is exact and lies strictly
// between 0 and 1.
TITOK_HD float gumbel(uint32_t word) {
  const float u = static_cast<float>(static_cast<int32_t>((word >> 9) * 2 + 1)) * 5.9604644775390625e-8f;
  return -log_fixed(-log_fixed(u));
}

}  // namespace titok
