// exp and log as fixed sequences of float32 multiplications and additions: with contraction into FMA switched off
// (-ffp-contract=off, -fmad=false) every compiler, instruction set and GPU gives the same bits.
// titok/ops/fixed_math.py is the same in PyTorch: change both or neither.
//
// The templates take F = float, or on the host a GCC vector of floats.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace titok {

template <class F>
struct Lanes;  // the 32-bit integers beside F, lane by lane
template <>
struct Lanes<float> {
  using Int = int32_t;
  static TITOK_HD Int truncate(float x) { return static_cast<Int>(x); }
  static TITOK_HD float convert(uint32_t x) { return static_cast<float>(x); }
};

constexpr int kWeightBits = 30;
constexpr float kLowestExponent = -22.0f;       // below it a weight rounds to 0 anyway; keeps 2^n normal
constexpr float kLogUnit = 20.7944154167983592f;  // 30 ln 2
constexpr float kLn2High = 0.693359375f;        // ten bits: a product with a small integer is exact
constexpr float kLn2Low = -2.12194440e-4f;

// exp(x) * 2^30 rounded to an integer, for x <= 0, -inf included.
template <class F>
TITOK_HD typename Lanes<F>::Int exp_weight(F x) {
  using Int = typename Lanes<F>::Int;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const F lowest = F{} + kLowestExponent;
  x = x > lowest ? x : lowest;
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * kLn2High) - n * kLn2Low;
  F p = r * 0.00831247866f + 0.0418905504f;
  p = p * r + 0.166671157f;
  p = p * r + 0.499992281f;
  p = (p * (r * r) + r) + 1.0f;
  // 2^(n + 30): the shift drops the bits of kRound above n.
  const F scale = bit_cast<F>(Int((bit_cast<Int>(shifted) + (127 + kWeightBits)) << 23));
  return Lanes<F>::truncate(p * scale + 0.5f);
}

// Natural logarithm of a positive normal float.
TITOK_HD float log_fixed(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // against sqrt(1/2): the mantissa lands in [0.707, 1.414)
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

// Standard Gumbel noise of a word's upper 23 bits: u = (k + 1/2) / 2^23 is exact and strictly inside (0, 1).
TITOK_HD float gumbel(uint32_t word) {
  const float u = static_cast<float>(static_cast<int32_t>((word >> 9) * 2 + 1)) * 5.9604644775390625e-8f;
  return -log_fixed(-log_fixed(u));
}

}  // namespace titok
