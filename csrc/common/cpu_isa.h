// Which of the compiled instruction-set variants to run on this machine.
//
// A file csrc/<op>_simd.cpp is compiled once per variant, its code in namespace titok::TITOK_ISA; csrc/<op>.cpp
// calls the variant of cpu_isa(). The environment variable TITOK_CPU_ISA (generic, avx2, avx512) lowers the choice,
// to test the others on one machine; it is read once.
#pragma once

#include <cstdlib>
#include <cstring>

namespace titok {

enum class CpuIsa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

inline CpuIsa detect_cpu_isa() {
  CpuIsa best = CpuIsa::kGeneric;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = CpuIsa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = CpuIsa::kAvx512;
    }
  }
#endif
  if (const char* wanted = std::getenv("TITOK_CPU_ISA")) {
    if (!std::strcmp(wanted, "generic")) return CpuIsa::kGeneric;
    if (!std::strcmp(wanted, "avx2") && best > CpuIsa::kAvx2) return CpuIsa::kAvx2;
  }
  return best;
}

inline CpuIsa cpu_isa() {
  static const CpuIsa isa = detect_cpu_isa();
  return isa;
}

// Whether the AVX-512 of this machine multiplies bfloat16, for which few files have a variant of their own. A
// TITOK_CPU_ISA that is set denies it.
inline bool cpu_multiplies_bf16() {
#if defined(__x86_64__)
  static const bool yes = cpu_isa() == CpuIsa::kAvx512 && __builtin_cpu_supports("avx512bf16") &&
                          !std::getenv("TITOK_CPU_ISA");
  return yes;
#else
  return false;
#endif
}

inline const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case CpuIsa::kAvx512: return "avx512";
    case CpuIsa::kAvx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace titok
