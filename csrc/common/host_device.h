// TITOK_HD marks functions that compile for the host by g++ and for both sides by nvcc. They are always inlined:
// an out-of-line copy from a file built for AVX-512 would be one symbol with the copies for lesser machines.
#pragma once

#include <cstring>

#if defined(__CUDACC__)
#define TITOK_HD __host__ __device__ __forceinline__
#else
#define TITOK_HD inline __attribute__((always_inline))
#endif

namespace titok {

template <class To, class From>
TITOK_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace titok
