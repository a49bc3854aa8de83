// What both decode steps share on CPU and GPU: guided logits, random numbers, sortable integers. Templates take
// F = float or, on the CPU, a GCC vector of floats. titok/ops/masked_decode_step.py states the definition.
#pragma once

#include <cfloat>
#include <cstdint>

#include "common/fixed_math.h"
#include "common/philox.h"

namespace titok {

constexpr int kMaxCodes = 262144;  // keeps the sum of a row's weights within 2^48
constexpr int kMaxTokens = 4096;   // of a row
constexpr int kSegment = 256;      // codes that a warp of a GPU takes at a time
constexpr float kInfinity = __builtin_inff();

// With any other scale all weights of a row could be 0, and there would be nothing to draw.
TITOK_HD bool usable_draw_scale(float draw_scale) { return draw_scale >= 0.0f && draw_scale <= FLT_MAX; }

// Offset of the logits of position n of row b, in elements. Row numbers that came unchecked (on a GPU) are
// clamped, so that no memory outside the logits is read.
TITOK_HD int64_t row_offset(const int64_t* rows, int64_t count, int64_t stride_b, int64_t stride_n, int64_t b,
                            int64_t n, int length) {
  if (rows == nullptr) return b * stride_b + n * stride_n;
  int64_t row = rows[b * length + n];
  row = row < count ? row : count - 1;
  return (row > 0 ? row : 0) * stride_n;
}

// Guided logit times the inverse temperature, made finite: NaN and -inf become the lowest float, +inf the highest.
template <class F>
TITOK_HD F finite_logit(F guided, float inverse_temperature) {
  const F low = F{} - FLT_MAX, high = F{} + FLT_MAX;
  return Lanes<F>::smaller(Lanes<F>::larger(guided * inverse_temperature, low), high);
}

// Classifier-free guidance (Ho and Salimans 2022).
template <class F>
TITOK_HD F guide(F cond, F uncond, float weight) {
  return uncond + (cond - uncond) * weight;
}

// The random numbers of one position of one sample in one step.
struct DecodeNoise {
  uint64_t uniform;       // for the draw
  uint32_t gumbel_word;   // for the confidence
  uint32_t renoise_word;  // for the uniform code that takes the place of a code that is not accepted
};

TITOK_HD DecodeNoise decode_noise(uint64_t seed, uint64_t sample, uint32_t step, uint32_t position) {
  const PhiloxWords words =
      philox4x32({position, step, uint32_t(sample), uint32_t(sample >> 32)}, uint32_t(seed), uint32_t(seed >> 32));
  return {uint64_t{words.w0} << 32 | words.w1, words.w2, words.w3};
}

// floor(fraction * total / 2^64): an integer below total. For total <= 2^48 and a uniform fraction its law differs
// from the uniform one by at most 2^-16 of the probability of each value.
TITOK_HD int64_t scale_fraction(uint64_t fraction, int64_t total) {
#if defined(__CUDA_ARCH__)
  return static_cast<int64_t>(__umul64hi(fraction, static_cast<uint64_t>(total)));
#else
  return static_cast<int64_t>((static_cast<unsigned __int128>(fraction) * static_cast<uint64_t>(total)) >> 64);
#endif
}

// The last addition turns -0 into +0, which would otherwise sort apart.
TITOK_HD float noisy_confidence(float score, uint32_t word, float noise) {
  return (score + gumbel(word) * noise) + 0.0f;
}

// Integers that sort like the floats.
TITOK_HD uint32_t sortable(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
TITOK_HD float from_sortable(int64_t integer) {
  const uint32_t bits = static_cast<uint32_t>(integer);
  return bit_cast<float>(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}

// An integer of 44 bits that sorts by `number`, then by position. Keys of the positions of a row are distinct.
constexpr int kKeyBits = 44;
TITOK_HD uint64_t key_of(uint32_t number, int64_t position) {
  return uint64_t{number} << 12 | static_cast<uint64_t>(position);
}
TITOK_HD int64_t position_of(uint64_t key) { return static_cast<int64_t>(key & (kMaxTokens - 1)); }

}  // namespace titok
