// MaskGIT decode step: what the CPU and the GPU share. titok/ops/maskgit_decode_step.py states the definition.
#pragma once

#include <cfloat>
#include <cstdint>

#include "common/fixed_math.h"
#include "common/philox.h"

namespace titok {

constexpr int kMaxCodes = 262144;  // keeps a row's sum of weights within 2^48
constexpr int kMaxTokens = 4096;

enum class LogitType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The numbers of one step. A captured graph reads them from device memory, so that a replay can change them.
struct DecodeParams {
  uint64_t seed;
  uint64_t first_sample;
  uint32_t step;
  int32_t num_masked;         // positions that stay masked, unless DecodeArgs::keep says so per sample
  float guidance;             // 1: the unconditional logits are not read
  float inverse_temperature;  // 1 / softmax temperature
  float noise;                // noise temperature
  float draw_scale;           // 0: greedy
};
static_assert(sizeof(DecodeParams) == 40, "titok.ops packs this layout");

// With any other scale the weights of a row could all be 0, and there would be nothing to draw.
TITOK_HD bool usable_draw_scale(float draw_scale) { return draw_scale >= 0.0f && draw_scale <= FLT_MAX; }

// Raw pointers and strides, in elements. Nothing here is owned.
struct DecodeArgs {
  const int64_t* tokens;  // (batch, length)
  const void* cond;       // row of (b, n): rows ? rows[b, n] * cond_stride_n : b * cond_stride_b + n * cond_stride_n
  const void* uncond;     // or null; likewise with uncond_rows
  const int64_t* rows;    // (batch, length), or null
  const int64_t* uncond_rows;
  const int64_t* keep;          // (batch): positions that stay masked, or null: params.num_masked for all
  const DecodeParams* params_at;  // or null: `params` below
  int64_t cond_stride_b, cond_stride_n, uncond_stride_b, uncond_stride_n;
  int64_t cond_rows_count, uncond_rows_count;  // with rows: how many there are
  int64_t mask_token;
  int32_t batch, length, codes;
  LogitType type;
  bool maskgit;        // confidence rule
  int64_t* out;        // (batch, length); may be `tokens`
  float* confidence;   // (batch, length)
  int32_t* drawn;      // (batch, length) workspace: the drawn code, -1 where known
  uint32_t* arrivals;  // (batch) GPU workspace, zero before and after
  DecodeParams params;
};

// Offset of a position's logits. Row numbers that came unchecked (on a GPU) are clamped into memory.
TITOK_HD int64_t row_offset(const int64_t* rows, int64_t count, int64_t stride_b, int64_t stride_n, int b, int n,
                            int length) {
  if (rows == nullptr) return b * stride_b + n * stride_n;
  int64_t row = rows[int64_t{b} * length + n];
  row = row < count ? row : count - 1;
  return (row > 0 ? row : 0) * stride_n;
}

// Finite y of a guided logit: NaN and -inf become the lowest float, +inf the highest.
template <class F>
TITOK_HD F finite_logit(F guided, float inverse_temperature) {
  const F low = F{} - FLT_MAX, high = F{} + FLT_MAX;
  F y = guided * inverse_temperature;
  y = y > low ? y : low;
  return y < high ? y : high;
}

template <class F>
TITOK_HD F guide(F cond, F uncond, float weight) {
  return uncond + (cond - uncond) * weight;
}

// floor(uniform * total / 2^64): a number below total, uniform up to 2^-16 of a unit.
TITOK_HD uint64_t scale_uniform(uint64_t uniform, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(uniform, total);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(uniform) * total) >> 64);
#endif
}

// Confidence without noise: y, or log softmax from x = y - max and the sum of the weights.
TITOK_HD float log_probability(float x, uint64_t total) {
  return x - (log_fixed(static_cast<float>(static_cast<int64_t>(total))) - kLogUnit);
}

TITOK_HD float noisy_confidence(float score, uint32_t word, float noise) {
  return (score + gumbel(word) * noise) + 0.0f;  // + 0: no negative zero, which would sort below the positive one
}

// Sorts by confidence, then position. Unique within a sample, 44 bits.
constexpr int kKeyBits = 44;
TITOK_HD uint64_t selection_key(float confidence, int position) {
  const uint32_t bits = bit_cast<uint32_t>(confidence);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 12 | static_cast<uint32_t>(position);
}

TITOK_HD int positions_kept(const DecodeArgs& args, const DecodeParams& params, int b, int masked) {
  int64_t keep = args.keep != nullptr ? args.keep[b] : params.num_masked;
  keep = keep < masked ? keep : masked;
  return static_cast<int>(keep > 0 ? keep : 0);
}

// What is wrong with tokens, rows or counts in host memory.
enum class DecodeError : int32_t { kNone = 0, kTokens, kRows, kUncondRows, kKeep };

DecodeError maskgit_decode_cpu(const DecodeArgs& args, int threads);

// Launches the step on a cudaStream_t; returns null, or CUDA's text for what went wrong.
const char* maskgit_decode_cuda(const DecodeArgs& args, void* stream);

}  // namespace titok
