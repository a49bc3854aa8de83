// The CPU's row kernel, once per instruction set: csrc/maskgit_decode_simd.cpp.
#pragma once

#include "maskgit_decode/maskgit_decode.h"

namespace titok {

struct DecodeRow {
  const void* cond;
  const void* uncond;  // or null
  LogitType type;
  int32_t codes;
  bool maskgit;
};

struct DrawnCode {
  int32_t code;
  float score;  // confidence without its noise
};

namespace generic {
DrawnCode draw_code(const DecodeRow& row, const DecodeParams& params, uint64_t uniform);
}
namespace avx2 {
DrawnCode draw_code(const DecodeRow& row, const DecodeParams& params, uint64_t uniform);
}
namespace avx512 {
DrawnCode draw_code(const DecodeRow& row, const DecodeParams& params, uint64_t uniform);
}

}  // namespace titok
