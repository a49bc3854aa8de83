// Which of the compiled instruction-set variants runs on this machine.
//
// Each csrc/<op>/<op>_simd.cpp is compiled once per instruction set. All its code lies in namespace
// titok::TITOK_ISA and in an unnamed namespace; it defines one overload of a function that returns the kernels,
// for the tag of its set:
//
//   const AddLayerNormKernels& add_layer_norm_kernels(Avx2);
#pragma once

namespace titok {

// Tags, to overload functions.
struct Generic {};
struct Avx2 {};
struct Avx512 {};
struct Avx512Vnni {};  // AVX-512 that also multiplies 8-bit integers; only int8_linear has code for it
struct Avx512Bf16 {};  // AVX-512 that also multiplies bfloat16; only masked_attention has code for it

enum class CpuIsa { kGeneric, kAvx2, kAvx512 };

// The best that the CPU has, detected at the first call. The environment variable TITOK_CPU_ISA (generic, avx2,
// avx512) lowers it, so that one machine can test the others.
CpuIsa cpu_isa();
const char* cpu_isa_name();

// Whether Avx512Vnni and Avx512Bf16 can run. False where TITOK_CPU_ISA is set, so that "avx512" means AVX-512 alone.
bool cpu_multiplies_int8();
bool cpu_multiplies_bf16();

// Calls visit with the tag of cpu_isa(). The branches return one type.
template <class Visit>
decltype(auto) for_this_cpu(Visit visit) {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return visit(Avx512{});
    case CpuIsa::kAvx2: return visit(Avx2{});
#endif
    default: return visit(Generic{});
  }
}

}  // namespace titok
