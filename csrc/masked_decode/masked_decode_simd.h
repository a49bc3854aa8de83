// The draw of one code from one row of logits, on the CPU.
#pragma once

#include "common/cpu_isa.h"
#include "masked_decode/masked_decode.h"

namespace titok {

struct LogitRow {
  const void* cond;         // (codes) dtype
  const void* uncond;       // (codes) dtype, or null
  const void* next_cond;    // of the row that this thread draws from next, or null; only prefetched
  const void* next_uncond;  // likewise
  DType dtype;              // float32, bfloat16 or float16
  int32_t codes;
  int64_t top_k, top_p;  // as in RowIntegers
  bool model_law;        // as in MaskedDecodeArgs
  Needs needs;
};

// One instruction set's.
using DrawToken = DrawnToken (*)(const LogitRow& row, const RowFloats& numbers, uint64_t uniform);
DrawToken draw_token_kernel(Generic);
DrawToken draw_token_kernel(Avx2);
DrawToken draw_token_kernel(Avx512);

// Writes the partial result of a stage for one chunk of codes; `row` begins at the chunk. `owns` says whether the
// drawn code lies in it.
struct ChunkOfCodes {
  Stage stage;
  int32_t shift, first_code;
  bool owns;
};
using ComputePartial = void (*)(const LogitRow& row, const RowFloats& numbers, const ChunkOfCodes& chunk,
                                const int64_t* state, int64_t* partial);
ComputePartial compute_partial_kernel(Generic);
ComputePartial compute_partial_kernel(Avx2);
ComputePartial compute_partial_kernel(Avx512);

}  // namespace titok
