// The draw of one code from one row of logits, on the CPU.
#pragma once

#include "common/cpu_isa.h"
#include "maskgit_decode/maskgit_decode.h"

namespace titok {

struct DecodeRow {
  const void* cond;    // (codes) dtype
  const void* uncond;  // (codes) dtype, or null
  DType dtype;         // float32, bfloat16 or float16
  int32_t codes;
  bool maskgit;  // confidence rule "maskgit", else "titok"
};

struct DrawnCode {
  int32_t code;
  float score;  // confidence without its noise
};

// One instruction set's.
using DrawCode = DrawnCode (*)(const DecodeRow& row, const DecodeParams& params, uint64_t uniform);
DrawCode draw_code_kernel(Generic);
DrawCode draw_code_kernel(Avx2);
DrawCode draw_code_kernel(Avx512);

}  // namespace titok
