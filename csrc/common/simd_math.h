// Powers of two of vectors, by minimax polynomials (found with the Remez algorithm).
//
// Unlike those of fixed_math.h they fuse multiplications and additions, so that results differ in the last bits between
// instruction sets. The tests of masked_attention and group_norm_silu compare them with float64.
#pragma once

#include "common/simd.h"

namespace titok::TITOK_ISA {
namespace {

// 1.5 * 2^23. Adding it to a small float rounds that to an integer, which the low bits of the sum then hold.
constexpr float kRoundToInteger = 12582912.0f;

// Coefficients of 2^f for |f| <= 1/2, highest power first, for results that are stored as Out.
template <class Out>
struct Exp2;
template <>
struct Exp2<float> {  // relative error 1.5e-7
  static constexpr int kCount = 6;
  static constexpr float kCoefficients[] = {1.327647245e-03f, 9.675541893e-03f, 5.550713092e-02f,
                                            2.402212024e-01f, 6.931469440e-01f, 1.000000119e+00f};
};
template <>
struct Exp2<BFloat16> {  // relative error 7.5e-5: 1/26 of half a unit in the last place
  static constexpr int kCount = 4;
  static constexpr float kCoefficients[] = {5.517166853e-02f, 2.426111400e-01f, 6.932609677e-01f, 9.999280572e-01f};
};

// 2^x for x <= 0, relative error 1.5e-7. Returns 0 for x < -126, -inf included, and NaN for NaN.
inline Floats exp2_nonpositive(Floats x) {
  using Polynomial = Exp2<float>;
  constexpr float kRound = kRoundToInteger + 127;  // so that the low bits hold the exponent field of 2^n
  const Floats shifted = x + kRound;
  const Floats f = x - (shifted - kRound);
  Floats p = broadcast(Polynomial::kCoefficients[0]);
#pragma GCC unroll 8
  for (int k = 1; k < Polynomial::kCount; ++k) p = fma(p, f, broadcast(Polynomial::kCoefficients[k]));
  p *= bit_cast<Floats>(bit_cast<Words>(shifted) << 23);
  return x < -126.0f ? Floats{} : p;
}

}  // namespace
}  // namespace titok::TITOK_ISA
