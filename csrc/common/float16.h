// Conversion of 16-bit floats to float32, which is exact.
#pragma once

#include "common/dtype.h"
#include "common/host_device.h"

namespace titok {

// float16 to float32 without the conversion instruction. A subnormal goes through an integer and one exact product, so
// that a CPU mode that flushes subnormals to zero changes nothing.
//
// Args: half: 32-bit words, a scalar or a GCC vector, whose lower 16 bits hold the float16. F: float, or the vector of
// floats with as many lanes.
template <class F, class Words>
TITOK_HD F widen_float16(Words half) {
  const Words sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  const Words normal = (magnitude << 13) + (112u << 23);   // the exponent's bias grows from 15 to 127
  const Words special = (magnitude << 13) | 0x7F800000u;  // infinity and NaN
  const Words subnormal = bit_cast<Words>(F(Lanes<F>::convert(magnitude) * 5.9604644775390625e-8f));  // 2^-24
  const Words wide = magnitude > 0x7BFFu ? special : normal;
  return bit_cast<F>(Words(sign | (magnitude < 0x0400u ? subnormal : wide)));
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
