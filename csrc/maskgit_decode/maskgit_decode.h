// One step of MaskGIT's decoding (Chang et al. 2022): what CPU and GPU share. titok/ops/maskgit_decode_step.py
// states the definition.
#pragma once

#include <cstdint>

#include "common/decode.h"
#include "common/dtype.h"

namespace titok {

// The numbers of one step. A captured CUDA graph reads them from device memory, so that a replay can change them.
struct DecodeParams {
  uint64_t seed;
  uint64_t first_sample;      // sample b of the batch draws the noise of sample first_sample + b
  uint32_t step;              // index of the step
  int32_t num_masked;         // positions that stay masked in each sample; DecodeArgs::keep overrides it
  float guidance;             // weight of the conditional logits; with 1 the unconditional ones are not read
  float inverse_temperature;  // 1 / softmax temperature
  float noise;                // noise temperature
  float draw_scale;           // factor of the logits before the draw, finite and >= 0; 0 takes the largest logit
};
static_assert(sizeof(DecodeParams) == 40, "titok.ops packs this layout");

// Index tensors are int64 and contiguous. Logits have unit stride along the codes; other strides are in elements.
struct DecodeArgs {
  const int64_t* tokens;  // (batch, length): codes, or mask_token where undecided
  // Logits of position (b, n): without rows at b * stride_b + n * stride_n, with rows at rows[b, n] * stride_n.
  const void* cond;
  const void* uncond;             // or null: no guidance
  const int64_t* rows;            // (batch, length), or null
  const int64_t* uncond_rows;     // (batch, length), or null: of uncond
  const int64_t* keep;            // (batch): positions that stay masked, or null: num_masked of the parameters
  const DecodeParams* params_at;  // GPU only: parameters in device memory, or null: `params`
  int64_t cond_stride_b, cond_stride_n, uncond_stride_b, uncond_stride_n;
  int64_t cond_rows_count, uncond_rows_count;  // rows that the logits have, where `rows` is given
  int64_t mask_token;                          // outside [0, codes)
  int32_t batch, length, codes;
  DType dtype;         // of the logits: float32, bfloat16 or float16
  bool maskgit;        // confidence rule "maskgit", else "titok"
  int64_t* out;        // (batch, length), output: the new tokens; may be `tokens`
  float* confidence;   // (batch, length), output: inf at positions that were known
  int32_t* drawn;      // (batch, length), GPU only, output: the drawn code, -1 at positions that were known
  uint32_t* arrivals;  // (batch), GPU only: zero before and after
  // (2, batch, length), GPU only, output, or null: the positions of each sample, first those that are masked after the
  // step, each kind ascending; and the place of each position among them.
  int64_t* order;
  DecodeParams params;
};

// log softmax of a code from x = (y - max y) * draw_scale and the sum of the row's weights.
TITOK_HD float log_probability(float x, int64_t total) {
  return x - (log_fixed(static_cast<float>(total)) - kLogUnit);
}

// How many of the `masked` positions of sample b stay masked.
TITOK_HD int positions_kept(const DecodeArgs& args, const DecodeParams& params, int b, int masked) {
  int64_t keep = args.keep != nullptr ? args.keep[b] : params.num_masked;
  keep = keep < masked ? keep : masked;
  return static_cast<int>(keep > 0 ? keep : 0);
}

// The input whose values are out of range, where memory is the host's.
enum class DecodeError : int32_t { kNone = 0, kTokens, kRows, kUncondRows, kKeep };

// The step on the CPU. Writes nothing unless it returns kNone.
DecodeError launch_maskgit_decode(const DecodeArgs& args, int threads);

// Launches the step on a cudaStream_t of the current device; returns null, or CUDA's text for what went wrong.
const char* launch_maskgit_decode_cuda(const DecodeArgs& args, void* stream);

}  // namespace titok
