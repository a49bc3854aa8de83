#include "common/cpu_isa.h"

#include <cstdlib>
#include <cstring>

namespace titok {
namespace {

CpuIsa detect() {
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

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case CpuIsa::kAvx512: return "avx512";
    case CpuIsa::kAvx2: return "avx2";
    default: return "generic";
  }
}

#if defined(__x86_64__)

bool cpu_multiplies_int8() {
  static const bool yes =
      cpu_isa() == CpuIsa::kAvx512 && __builtin_cpu_supports("avx512vnni") && !std::getenv("TITOK_CPU_ISA");
  return yes;
}

bool cpu_multiplies_bf16() {
  static const bool yes = cpu_multiplies_int8() && __builtin_cpu_supports("avx512bf16");
  return yes;
}

#else

bool cpu_multiplies_int8() { return false; }
bool cpu_multiplies_bf16() { return false; }

#endif

}  // namespace titok
