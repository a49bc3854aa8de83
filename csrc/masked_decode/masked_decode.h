// One decode step of a masked or uniform-state generator on the CPU. titok/ops/masked_decode_step.py states the
// definition.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/fixed_math.h"
#include "common/philox.h"

namespace titok {

constexpr int kMaskedDecodeCodes = 262144;      // keeps the sum of a row's weights within 2^48
constexpr int kMaskedDecodeTokens = 4096;       // of a row
constexpr int64_t kTopPOne = int64_t{1} << 32;  // RowIntegers::top_p counts units of 2^-32
constexpr float kOne = 1073741824.0f;           // 2^30: the weight of the largest logit
constexpr float kEntropyUnit = 16777216.0f;     // entropies are compared as integers

// The numbers of one row: the columns of the tensors `integers` and `floats`.
struct RowIntegers {
  int64_t seed;  // the unsigned 64 bits
  int64_t sample, step, count;
  int64_t top_k;       // 0: all codes
  int64_t top_p;       // kTopPOne: all codes
  int64_t start, end;  // window of positions
};
static_assert(sizeof(RowIntegers) == 8 * 8, "titok.ops packs this layout");

struct RowFloats {
  float guidance;
  float inverse_temperature;  // factor of the guided logits
  float draw_scale;           // factor of the logits before the draw, finite and >= 0; 0 draws greedily
  float noise;                // scale of the confidence's Gumbel noise
  float limit;                // log of the threshold, the bound of the entropy, or the factor
  float edit_limit;           // log of the threshold of editing
};
static_assert(sizeof(RowFloats) == 6 * 4, "titok.ops packs this layout");

// In the order of POLICIES and CONFIDENCES in titok/ops/masked_decode_plain.py.
enum class Policy : int32_t { kCount, kTopK, kThreshold, kEntropy, kLeftmost, kFactor };
enum class Confidence : int32_t { kLogit, kLogProbability, kNegativeEntropy, kRandom, kProbability, kMargin };

// Index tensors are contiguous, (batch, length). Logits have unit stride along the codes; other strides are in
// elements.
struct MaskedDecodeArgs {
  const int64_t* tokens;
  // Logits of position (b, n): without rows at b * stride_b + n * stride_n, with rows at rows[b, n] * stride_n.
  const void* cond;
  const void* uncond;          // or null: no guidance
  const int64_t* rows;         // or null
  const int64_t* uncond_rows;  // or null: of uncond
  const bool* undecided;       // or null: where tokens are mask_token
  const bool* editable;        // or null: all decided positions
  const int32_t* step_map;     // or null
  const RowIntegers* integers;
  const RowFloats* floats;
  int64_t cond_stride_b, cond_stride_n, uncond_stride_b, uncond_stride_n;
  int64_t cond_rows_count, uncond_rows_count;  // rows that the logits have, where `rows` is given
  int64_t mask_token;
  int32_t batch, length, codes, block_length;  // block_length 0: no blocks
  DType dtype;                                 // of the logits: float32 or bfloat16
  Policy policy;
  Confidence confidence;
  bool model_law;  // log-probabilities and entropies are of softmax(y), not of the law that was drawn from
  bool renoise, edits;
  int64_t* out;              // output: the new tokens; may be `tokens`
  float* confidences;        // output: inf where nothing was drawn
  float* log_probabilities;  // output or null: 0 where nothing was drawn
  int32_t* new_step_map;     // output, null where step_map is; may be step_map
};

// Integers that sort like the floats.
TITOK_HD uint32_t sortable(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
TITOK_HD float from_sortable(int64_t integer) {
  const uint32_t bits = static_cast<uint32_t>(integer);
  return bit_cast<float>(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}

// Stages of a step whose codes are split; titok/ops/masked_decode_split.py states what each computes.
enum class Stage : int32_t { kPeak, kCount, kMass, kSums, kFind };
constexpr int kDigitBits = 4, kDigits = 1 << kDigitBits;
constexpr int kCodeBits = 18;
constexpr int64_t kCodeMask = (1 << kCodeBits) - 1;
TITOK_HD int partial_width(Stage stage) {
  return stage == Stage::kPeak ? 2 : stage == Stage::kSums ? 3 : stage == Stage::kFind ? 1 : kDigits;
}

// Columns of the state of a position. Logits are stored as sortable integers.
enum Column { kKind, kTop, kTopCode, kSecond, kFound, kLeft, kLowest, kOwner, kDrawnSum, kLawSum, kProducts, kCode,
              kLogit, kColumns };
constexpr int64_t kNoKind = 0, kCandidateKind = 1, kEditableKind = 2;

// A stage over some chunks of the codes, from `first_code` and chunk `first_chunk` on.
struct PartialArgs {
  MaskedDecodeArgs step;  // of which logits, numbers, sizes and dtype are read; `codes` are those given here
  Stage stage;
  int32_t shift, all_codes, first_code, first_chunk, chunks;
  bool needs_law, needs_products, needs_second;
  const int64_t* state;  // (batch, length, kColumns)
  int64_t* partials;     // (batch, length, chunks, partial_width), output
};

TITOK_HD bool usable_scale(float scale) { return scale >= 0.0f && scale <= 3.4028234663852886e38f; }

// Whether a row has something to do in a stage.
TITOK_HD bool works(Stage stage, const RowIntegers& row, float draw_scale, int all_codes, bool needs_law) {
  const bool draws = draw_scale > 0.0f;
  switch (stage) {
    case Stage::kPeak: return true;
    case Stage::kCount: return draws && row.top_k > 0 && row.top_k < all_codes;
    case Stage::kMass: return draws && row.top_p < kTopPOne;
    case Stage::kSums: return draws || needs_law;
    default: return draws;
  }
}

// floor(fraction * total / 2^64).
TITOK_HD int64_t scale_fraction(uint64_t fraction, int64_t total) {
  return static_cast<int64_t>((static_cast<unsigned __int128>(fraction) * static_cast<uint64_t>(total)) >> 64);
}

const char* launch_masked_decode_partial(const PartialArgs& args, int threads);

// Returns the name of an index tensor that holds a row outside the logits, and has then written nothing; or null.
const char* launch_masked_decode(const MaskedDecodeArgs& args, int threads);

}  // namespace titok
