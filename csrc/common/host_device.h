// What code needs that is compiled for the CPU and for the GPU.
#pragma once

#include <cstdint>
#include <cstring>

// Marks functions that g++ compiles for the CPU and nvcc for both sides. They are always inlined: an out-of-line
// copy from a file that is compiled for AVX-512 would share its symbol with the copies for lesser CPUs, and the
// linker would keep any one of them for all.
#if defined(__CUDACC__)
#define TITOK_HD __host__ __device__ __forceinline__
#else
#define TITOK_HD inline __attribute__((always_inline))
#endif

namespace titok {

// The same bits as another type of the same size.
template <class To, class From>
TITOK_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// For templates over F, which is float or a GCC vector of floats: the 32-bit integers of the same number of lanes,
// conversions lane by lane, `a > b ? a : b` and `a < b ? a : b`, which GCC does not make one instruction for vectors, and
// `fuse`: a * b + c, rounded once or twice, for products that are exact.
// masked_decode/logit_lanes.h specialises it for its vectors.
template <class F>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
  static TITOK_HD Int truncate(float x) { return static_cast<Int>(x); }
  static TITOK_HD float convert(uint32_t x) { return static_cast<float>(x); }
  static TITOK_HD float larger(float a, float b) { return a > b ? a : b; }
  static TITOK_HD float smaller(float a, float b) { return a < b ? a : b; }
  static TITOK_HD float fuse(float a, float b, float c) { return a * b + c; }
};

}  // namespace titok
