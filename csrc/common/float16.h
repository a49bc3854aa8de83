// 16-bit floats to float32, exactly.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/fixed_math.h"

namespace titok {

// Without the hardware's conversion. Subnormals go through an integer and one exact product, so that a flush-to-zero
// mode changes nothing. Bits: 32-bit words holding 16 bits each, a scalar or a GCC vector, F the floats beside them.
template <class F, class Bits>
TITOK_HD F widen_float16(Bits half) {
  const Bits sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  const Bits normal = (magnitude << 13) + (112u << 23);
  const Bits special = (magnitude << 13) | 0x7F800000u;  // infinities and NaN
  const Bits subnormal = bit_cast<Bits>(F(Lanes<F>::convert(magnitude) * 5.9604644775390625e-8f));
  const Bits wide = magnitude > 0x7BFFu ? special : normal;
  return bit_cast<F>(Bits(sign | (magnitude < 0x0400u ? subnormal : wide)));
}

TITOK_HD float to_float(float x) { return x; }

TITOK_HD float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

TITOK_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return widen_float16<float>(uint32_t{x.bits});
#endif
}

}  // namespace titok
