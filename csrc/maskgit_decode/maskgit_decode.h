// One step of MaskGIT's decoding (Chang et al. 2022): what CPU and GPU share. titok/ops/maskgit_decode_step.py
// states the definition.
#pragma once

#include <cfloat>
#include <cstdint>

#include "common/dtype.h"
#include "common/fixed_math.h"
#include "common/philox.h"

namespace titok {

constexpr int kMaxCodes = 262144;  // keeps the sum of a row's weights within 2^48
constexpr int kMaxTokens = 4096;   // of a sample

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

// With any other scale all weights of a row could be 0, and there would be nothing to draw.
TITOK_HD bool usable_draw_scale(float draw_scale) { return draw_scale >= 0.0f && draw_scale <= FLT_MAX; }

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

// Offset of the logits of position n of sample b, in elements. Row numbers that came unchecked (on a GPU) are
// clamped, so that no memory outside the logits is read.
TITOK_HD int64_t row_offset(const int64_t* rows, int64_t count, int64_t stride_b, int64_t stride_n, int b, int n,
                            int length) {
  if (rows == nullptr) return b * stride_b + n * stride_n;
  int64_t row = rows[int64_t{b} * length + n];
  row = row < count ? row : count - 1;
  return (row > 0 ? row : 0) * stride_n;
}

// Guided logit times the inverse temperature, made finite: NaN and -inf become the lowest float, +inf the highest.
template <class F>
TITOK_HD F finite_logit(F guided, float inverse_temperature) {
  const F low = F{} - FLT_MAX, high = F{} + FLT_MAX;
  F y = guided * inverse_temperature;
  y = y > low ? y : low;
  return y < high ? y : high;
}

// Classifier-free guidance (Ho and Salimans 2022).
template <class F>
TITOK_HD F guide(F cond, F uncond, float weight) {
  return uncond + (cond - uncond) * weight;
}

// The random numbers of one position of one sample in one step.
struct DecodeNoise {
  uint64_t uniform;      // for the draw
  uint32_t gumbel_word;  // for the confidence
};

TITOK_HD DecodeNoise decode_noise(uint64_t seed, uint64_t sample, uint32_t step, uint32_t position) {
  const PhiloxWords words =
      philox4x32({position, step, uint32_t(sample), uint32_t(sample >> 32)}, uint32_t(seed), uint32_t(seed >> 32));
  return {uint64_t{words.w0} << 32 | words.w1, words.w2};
}

// floor(uniform * total / 2^64): an integer below total. For total <= 2^48 its law differs from the uniform one by
// at most 2^-16 of the probability of each value.
TITOK_HD uint64_t scale_uniform(uint64_t uniform, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(uniform, total);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(uniform) * total) >> 64);
#endif
}

// log softmax of a code from x = (y - max y) * draw_scale and the sum of the row's weights.
TITOK_HD float log_probability(float x, uint64_t total) {
  return x - (log_fixed(static_cast<float>(static_cast<int64_t>(total))) - kLogUnit);
}

// The last addition turns -0 into +0, which would otherwise sort apart.
TITOK_HD float noisy_confidence(float score, uint32_t word, float noise) {
  return (score + gumbel(word) * noise) + 0.0f;
}

// An integer of 44 bits that sorts by confidence, then by position. Keys of a sample are distinct.
constexpr int kKeyBits = 44;
TITOK_HD uint64_t selection_key(float confidence, int position) {
  const uint32_t bits = bit_cast<uint32_t>(confidence);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 12 | static_cast<uint32_t>(position);
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
