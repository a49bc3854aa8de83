// One decode step of a masked or uniform-state generator: what CPU and GPU share. titok/ops/masked_decode_step.py
// states the definition.
#pragma once

#include <cstdint>

#include "common/decode.h"
#include "common/dtype.h"

namespace titok {

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
  DType dtype;                                 // of the logits: float32, bfloat16 or float16
  Policy policy;
  Confidence confidence;
  bool model_law;  // log-probabilities and entropies are of softmax(y), not of the law that was drawn from
  bool renoise, edits;
  int64_t* out;              // output: the new tokens; may be `tokens`
  float* confidences;        // output: inf where nothing was drawn
  float* log_probabilities;  // output or null: 0 where nothing was drawn
  int32_t* new_step_map;     // output, null where step_map is; may be step_map
};

// What must be computed beside the drawn codes.
struct Needs {
  bool law;      // whether a probability or an entropy is read
  bool entropy;  // whether an entropy is read
  bool margin;   // whether the second largest logit is read
};

TITOK_HD Needs needs_of(const MaskedDecodeArgs& args) {
  const bool entropy = args.policy == Policy::kEntropy || args.confidence == Confidence::kNegativeEntropy;
  const bool margin = args.confidence == Confidence::kMargin;
  const bool law = entropy || margin || args.confidence == Confidence::kLogProbability ||
                   args.confidence == Confidence::kProbability || args.policy == Policy::kThreshold ||
                   args.policy == Policy::kFactor || args.edits || args.log_probabilities != nullptr;
  return {law, entropy, margin};
}

// What is known of the code that was drawn at a position.
struct DrawnToken {
  int32_t code;
  float logit;            // y of the code
  float log_probability;  // 0 unless Needs::law; rounding may raise it above 0
  float entropy;          // 0 unless Needs::entropy
  float margin;           // 0 unless Needs::margin
};

// Sets what depends on the law softmax((y - top) * scale), of which the sums of the weights and of the products for
// the entropy are known, and the weight of the second largest logit.
TITOK_HD void evaluate_law(DrawnToken& drawn, float top, float scale, int64_t weights, int64_t products,
                           int64_t second) {
  const float total = static_cast<float>(weights), log_total = log_fixed(total) - kLogUnit;
  const float entropy = log_total + static_cast<float>(products) / total;
  drawn.log_probability = (drawn.logit - top) * scale - log_total;
  drawn.entropy = entropy > 0.0f ? entropy : 0.0f;
  drawn.margin = static_cast<float>(static_cast<int64_t>(kOne) - second) / total;
}

// The confidence without its noise. Clamps the log-probability.
TITOK_HD float score_of(Confidence confidence, DrawnToken& drawn) {
  const float log_probability = drawn.log_probability;
  drawn.log_probability = log_probability < 0.0f ? log_probability : 0.0f;
  switch (confidence) {
    case Confidence::kLogit: return drawn.logit;
    case Confidence::kLogProbability: return log_probability;
    case Confidence::kNegativeEntropy: return -drawn.entropy;
    case Confidence::kProbability: return static_cast<float>(exp_weight(drawn.log_probability)) / kOne;
    case Confidence::kMargin: return drawn.margin;
    default: return 0.0f;
  }
}

// The number by which a policy sorts its candidates, ascending.
TITOK_HD uint32_t sort_number(Policy policy, const DrawnToken& drawn, float confidence) {
  switch (policy) {
    case Policy::kCount: return sortable(confidence);
    case Policy::kEntropy: return static_cast<uint32_t>(drawn.entropy * kEntropyUnit);
    case Policy::kLeftmost: return 0;
    case Policy::kFactor: return ~sortable(drawn.log_probability);
    default: return ~sortable(confidence);
  }
}

// A uniformly drawn code.
TITOK_HD int64_t uniform_code(uint32_t word, int32_t codes) {
  return static_cast<int64_t>(uint64_t{word} * static_cast<uint64_t>(codes) >> 32);
}

TITOK_HD DecodeNoise decode_noise(const RowIntegers& row, int64_t position) {
  return decode_noise(static_cast<uint64_t>(row.seed), static_cast<uint64_t>(row.sample),
                      static_cast<uint32_t>(row.step), static_cast<uint32_t>(position));
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
  Needs needs;
  const int64_t* state;  // (batch, length, kColumns)
  int64_t* partials;     // (batch, length, chunks, partial_width), output
};

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

// A step on the GPU. Every block takes one chunk of the codes of one position.
struct GpuDecodeArgs {
  MaskedDecodeArgs step;
  Needs needs;
  bool truncates;        // whether some row's top_k or top_p may leave out codes
  int32_t chunk;         // codes of a chunk: a multiple of kSegment, at most kMostChunk
  int32_t chunks;        // of a position
  int64_t* state;        // (batch, length, kColumns), written
  int64_t* partials;     // (batch, length, chunks, kDigits), written
  uint32_t* arrivals;    // (batch, length), written
};
constexpr int kMostChunk = 32768;  // keeps sums of 16-bit halves within 32 bits

const char* launch_masked_decode_partial(const PartialArgs& args, int threads);

// Launches the step on a cudaStream_t of the current device; returns null, or CUDA's text for what went wrong.
const char* launch_masked_decode_cuda(const GpuDecodeArgs& args, void* stream);

// Returns the name of an index tensor that holds a row outside the logits, and has then written nothing; or null.
const char* launch_masked_decode(const MaskedDecodeArgs& args, int threads);

}  // namespace titok
