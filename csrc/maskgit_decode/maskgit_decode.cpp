// One step of MaskGIT's decoding on the CPU. Masked positions are shared among threads. The thread that draws the last
// code of a sample selects which of its positions stay masked.
#include "maskgit_decode/maskgit_decode.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "maskgit_decode/maskgit_decode_simd.h"

namespace titok {
namespace {

constexpr int kPositionsAtOnce = 4;           // that a thread takes at a time
constexpr int64_t kCodesAlone = 1 << 15;  // up to so many (about 70 us of work) one thread is faster than all

DecodeError check(const DecodeArgs& args) {
  const int64_t count = int64_t{args.batch} * args.length;
  const auto outside = [](const int64_t* rows, int64_t i, int64_t end) {
    return rows != nullptr && (rows[i] < 0 || rows[i] >= end);
  };
  for (int64_t i = 0; i < count; ++i) {
    if (args.tokens[i] != args.mask_token) {
      if (args.tokens[i] < 0 || args.tokens[i] >= args.codes) return DecodeError::kTokens;
      continue;
    }
    if (outside(args.rows, i, args.cond_rows_count)) return DecodeError::kRows;
    if (args.uncond != nullptr && outside(args.uncond_rows, i, args.uncond_rows_count)) return DecodeError::kUncondRows;
  }
  for (int b = 0; args.keep != nullptr && b < args.batch; ++b) {
    if (args.keep[b] < 0) return DecodeError::kKeep;
  }
  return DecodeError::kNone;
}

const void* row_at(const DecodeArgs& args, const void* logits, int64_t offset) {
  if (logits == nullptr) return nullptr;
  return static_cast<const char*>(logits) + offset * bytes_of(args.dtype);
}

// Writes the new tokens of sample b. `drawn` holds the drawn codes, -1 where a token was known.
void select(const DecodeArgs& args, const DecodeParams& params, int b, const int32_t* drawn) {
  const int64_t base = int64_t{b} * args.length;
  std::vector<uint64_t> keys;
  for (int n = 0; n < args.length; ++n) {
    if (drawn[base + n] >= 0) keys.push_back(selection_key(args.confidence[base + n], n));
  }
  const int keep = positions_kept(args, params, b, static_cast<int>(keys.size()));
  if (keep > 0) std::nth_element(keys.begin(), keys.begin() + (keep - 1), keys.end());
  for (int n = 0; n < args.length; ++n) {
    args.out[base + n] = drawn[base + n] >= 0 ? drawn[base + n] : args.tokens[base + n];
  }
  for (int i = 0; i < keep; ++i) args.out[base + (keys[i] & (kMaxTokens - 1))] = args.mask_token;
}

}  // namespace

DecodeError launch_maskgit_decode(const DecodeArgs& args, int threads) {
  const DecodeError error = check(args);
  if (error != DecodeError::kNone) return error;
  const DecodeParams params = args.params_at != nullptr ? *args.params_at : args.params;
  const DrawCode draw_code = for_this_cpu([](auto isa) { return draw_code_kernel(isa); });
  const int64_t count = int64_t{args.batch} * args.length;
  std::vector<int32_t> drawn(count, -1);
  std::vector<int32_t> missing(args.batch, 0);  // codes of each sample that are still to be drawn
  std::vector<int64_t> masked;                  // the masked positions of the batch
  for (int64_t i = 0; i < count; ++i) {
    if (args.tokens[i] == args.mask_token) {
      masked.push_back(i);
      ++missing[i / args.length];
    } else {
      args.confidence[i] = std::numeric_limits<float>::infinity();
    }
  }
  for (int b = 0; b < args.batch; ++b) {
    if (missing[b] == 0) select(args, params, b, drawn.data());
  }
  const int64_t positions = static_cast<int64_t>(masked.size());
  // One thread or all: libgomp ends the threads that a smaller team leaves idle. Never more than there are processors or
  // than PyTorch uses.
  const int most = std::min(threads, std::max(omp_get_max_threads(), omp_get_num_procs()));
  const int team = positions * args.codes <= kCodesAlone ? 1 : most;

#pragma omp parallel for schedule(dynamic, kPositionsAtOnce) num_threads(team)
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t i = masked[p];
    const int b = static_cast<int>(i / args.length), n = static_cast<int>(i % args.length);
    const int64_t cond =
        row_offset(args.rows, args.cond_rows_count, args.cond_stride_b, args.cond_stride_n, b, n, args.length);
    const int64_t uncond = row_offset(args.uncond_rows, args.uncond_rows_count, args.uncond_stride_b,
                                      args.uncond_stride_n, b, n, args.length);
    const DecodeRow row = {row_at(args, args.cond, cond), row_at(args, args.uncond, uncond), args.dtype, args.codes,
                           args.maskgit};
    const DecodeNoise noise = decode_noise(params.seed, params.first_sample + b, params.step, n);
    const DrawnCode code = draw_code(row, params, noise.uniform);
    drawn[i] = code.code;
    args.confidence[i] = noisy_confidence(code.score, noise.gumbel_word, params.noise);
    if (__atomic_sub_fetch(&missing[b], 1, __ATOMIC_ACQ_REL) == 0) select(args, params, b, drawn.data());
  }
  return DecodeError::kNone;
}

}  // namespace titok
