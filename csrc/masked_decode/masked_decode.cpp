// One decode step on the CPU. Positions at which a code is drawn are shared among threads, and after them the rows,
// in which the policy accepts.
#include "masked_decode/masked_decode.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "masked_decode/masked_decode_simd.h"

namespace titok {
namespace {

constexpr int kPositionsAtOnce = 4;       // that a thread takes at a time
constexpr int64_t kCodesAlone = 1 << 15;  // up to so many (about 70 us of work) one thread is faster than all

enum class Kind : uint8_t { kNone, kCandidate, kEditable };

// What is known of each position of the batch.
struct Positions {
  explicit Positions(int64_t count) : kind(count, Kind::kNone), drawn(count), words(count), keys(count) {}
  std::vector<Kind> kind;
  std::vector<DrawnToken> drawn;
  std::vector<uint32_t> words;  // random words of `renoise`
  std::vector<uint64_t> keys;   // memory to sort in, because an exception must not leave a parallel region
};

// Fills the kinds of the positions of row b.
void find_candidates(const MaskedDecodeArgs& args, int b, Kind* kind) {
  const int64_t base = int64_t{b} * args.length;
  const RowIntegers& row = args.integers[b];
  const int64_t start = std::max<int64_t>(row.start, 0);
  int64_t first = start, end = std::min<int64_t>(row.end, args.length);
  const auto is_undecided = [&](int64_t n) {
    return args.undecided != nullptr ? args.undecided[base + n] : args.tokens[base + n] == args.mask_token;
  };
  if (args.block_length > 0) {
    while (first < end && !is_undecided(first)) ++first;
    if (first >= end) return;
    first = start + (first - start) / args.block_length * args.block_length;
    end = std::min<int64_t>(end, first + args.block_length);
  }
  for (int64_t n = first; n < end; ++n) {
    if (is_undecided(n)) {
      kind[n] = Kind::kCandidate;
    } else if (args.edits && (args.editable == nullptr || args.editable[base + n])) {
      kind[n] = Kind::kEditable;
    }
  }
}

const void* row_at(const MaskedDecodeArgs& args, const void* logits, int64_t offset) {
  return logits == nullptr ? nullptr : static_cast<const char*>(logits) + offset * bytes_of(args.dtype);
}

// Guided and unguided logits of position i.
struct Logits {
  const void* cond = nullptr;
  const void* uncond = nullptr;
};

Logits logits_at(const MaskedDecodeArgs& args, int64_t i) {
  const int64_t b = i / args.length, n = i % args.length;
  const int64_t cond =
      row_offset(args.rows, args.cond_rows_count, args.cond_stride_b, args.cond_stride_n, b, n, args.length);
  const int64_t uncond = row_offset(args.uncond_rows, args.uncond_rows_count, args.uncond_stride_b,
                                    args.uncond_stride_n, b, n, args.length);
  return {row_at(args, args.cond, cond), row_at(args, args.uncond, uncond)};
}

// Draws at position i, and writes its confidence and log-probability. `next` is drawn from after it.
void draw_at(const MaskedDecodeArgs& args, DrawToken draw_token, int64_t i, const Logits& next,
             Positions& positions) {
  const int b = static_cast<int>(i / args.length);
  const int64_t n = i % args.length;
  const RowIntegers& row = args.integers[b];
  const RowFloats& numbers = args.floats[b];
  const Logits here = logits_at(args, i);
  const LogitRow logits = {here.cond,  here.uncond, next.cond, next.uncond,    args.dtype,
                           args.codes, row.top_k,   row.top_p, args.model_law, needs_of(args)};
  const DecodeNoise noise = decode_noise(row, n);
  DrawnToken drawn = draw_token(logits, numbers, noise.uniform);
  args.confidences[i] = noisy_confidence(score_of(args.confidence, drawn), noise.gumbel_word, numbers.noise);
  if (args.log_probabilities != nullptr) args.log_probabilities[i] = drawn.log_probability;
  positions.drawn[i] = drawn;
  positions.words[i] = noise.renoise_word;
}

// Calls accept(n) for the positions of row b that the policy accepts.
template <class Accept>
void apply_policy(const MaskedDecodeArgs& args, int b, Positions& positions, Accept accept) {
  const int64_t base = int64_t{b} * args.length;
  const RowFloats& numbers = args.floats[b];
  uint64_t* const keys = positions.keys.data() + base;
  const DrawnToken* const drawn = positions.drawn.data() + base;
  int64_t found = 0;
  for (int64_t n = 0; n < args.length; ++n) {
    if (positions.kind[base + n] != Kind::kCandidate) continue;
    keys[found++] = key_of(sort_number(args.policy, drawn[n], args.confidences[base + n]), n);
  }
  const int64_t count = std::clamp<int64_t>(args.integers[b].count, 0, found);
  if (args.policy == Policy::kEntropy) {
    std::sort(keys, keys + found);
    const int64_t bound = static_cast<int64_t>(numbers.limit * kEntropyUnit);
    int64_t before = 0;
    for (int64_t i = 0; i < found && (i < count || before <= bound); ++i) {
      accept(position_of(keys[i]));
      before += static_cast<int64_t>(keys[i] >> 12);
    }
    return;
  }
  if (args.policy == Policy::kFactor) {
    std::sort(keys, keys + found);
    const int64_t bound = static_cast<int64_t>(numbers.limit * kOne);
    for (int64_t i = 0; i < found; ++i) {
      const int64_t doubt = static_cast<int64_t>(kOne) - exp_weight(drawn[position_of(keys[i])].log_probability);
      if (i < count || (i + 2) * doubt < bound) accept(position_of(keys[i]));
    }
    return;
  }
  if (count > 0 && count < found) std::nth_element(keys, keys + (count - 1), keys + found);
  const int64_t first = args.policy == Policy::kCount ? count : 0;
  const int64_t last = args.policy == Policy::kCount ? found : count;
  for (int64_t i = first; i < last; ++i) accept(position_of(keys[i]));
  for (int64_t i = last; args.policy == Policy::kThreshold && i < found; ++i) {
    if (drawn[position_of(keys[i])].log_probability > numbers.limit) accept(position_of(keys[i]));
  }
}

// Writes the new tokens and the step map of row b.
void write_row(const MaskedDecodeArgs& args, int b, Positions& positions) {
  const int64_t base = int64_t{b} * args.length;
  const auto accept = [&](int64_t n) {
    args.out[base + n] = positions.drawn[base + n].code;
    if (args.new_step_map != nullptr) args.new_step_map[base + n] = static_cast<int32_t>(args.integers[b].step);
  };
  for (int64_t i = base; i < base + args.length; ++i) {
    int64_t token = args.tokens[i];
    if (args.renoise && positions.kind[i] == Kind::kCandidate) {
      token = uniform_code(positions.words[i], args.codes);
    }
    args.out[i] = token;
    if (args.new_step_map != nullptr) args.new_step_map[i] = args.step_map[i];
  }
  apply_policy(args, b, positions, accept);
  for (int64_t n = 0; args.edits && n < args.length; ++n) {
    const DrawnToken& drawn = positions.drawn[base + n];
    if (positions.kind[base + n] == Kind::kEditable && drawn.code != args.out[base + n] &&
        drawn.log_probability > args.floats[b].edit_limit) {
      accept(n);
    }
  }
}

}  // namespace

const char* launch_masked_decode(const MaskedDecodeArgs& args, int threads) {
  const int64_t count = int64_t{args.batch} * args.length;
  Positions positions(count);
  for (int b = 0; b < args.batch; ++b) find_candidates(args, b, &positions.kind[int64_t{b} * args.length]);
  std::vector<int64_t> to_draw;
  for (int64_t i = 0; i < count; ++i) {
    if (positions.kind[i] == Kind::kNone) continue;
    to_draw.push_back(i);
    if (args.rows != nullptr && (args.rows[i] < 0 || args.rows[i] >= args.cond_rows_count)) return "rows";
    if (args.uncond_rows != nullptr && (args.uncond_rows[i] < 0 || args.uncond_rows[i] >= args.uncond_rows_count))
      return "uncond_rows";
  }
  for (int64_t i = 0; i < count; ++i) {
    if (positions.kind[i] != Kind::kNone) continue;
    args.confidences[i] = std::numeric_limits<float>::infinity();
    if (args.log_probabilities != nullptr) args.log_probabilities[i] = 0.0f;
  }
  const DrawToken draw_token = for_this_cpu([](auto isa) { return draw_token_kernel(isa); });
  const int64_t draws = static_cast<int64_t>(to_draw.size());
  // One thread or all: libgomp ends the threads that a smaller team leaves idle.
  const int most = std::min(threads, std::max(omp_get_max_threads(), omp_get_num_procs()));
  const int team = draws * args.codes <= kCodesAlone ? 1 : most;
#pragma omp parallel num_threads(team)
  {
#pragma omp for schedule(dynamic, kPositionsAtOnce)
    for (int64_t p = 0; p < draws; ++p) {
      const Logits next = p + 1 < draws ? logits_at(args, to_draw[p + 1]) : Logits{};
      draw_at(args, draw_token, to_draw[p], next, positions);
    }
#pragma omp for schedule(dynamic, 1)
    for (int b = 0; b < args.batch; ++b) write_row(args, b, positions);
  }
  return nullptr;
}

const char* launch_masked_decode_partial(const PartialArgs& args, int threads) {
  const MaskedDecodeArgs& step = args.step;
  const int64_t positions = int64_t{step.batch} * step.length;
  const int64_t size = (int64_t{step.codes} + args.chunks - 1) / args.chunks;
  const int width = partial_width(args.stage);
  const auto is_outside = [](const int64_t* rows, int64_t i, int64_t count) {
    return rows != nullptr && (rows[i] < 0 || rows[i] >= count);
  };
  for (int64_t i = 0; i < positions; ++i) {
    if (args.state[i * kColumns + kKind] == kNoKind) continue;
    if (is_outside(step.rows, i, step.cond_rows_count)) return "rows";
    if (step.uncond != nullptr && is_outside(step.uncond_rows, i, step.uncond_rows_count)) return "uncond_rows";
  }
  const ComputePartial compute = for_this_cpu([](auto isa) { return compute_partial_kernel(isa); });
  const int most = std::min(threads, std::max(omp_get_max_threads(), omp_get_num_procs()));
  const int team = positions * step.codes <= kCodesAlone ? 1 : most;
#pragma omp parallel for schedule(dynamic, kPositionsAtOnce) num_threads(team)
  for (int64_t item = 0; item < positions * args.chunks; ++item) {
    const int64_t i = item / args.chunks, chunk = item % args.chunks;
    const int b = static_cast<int>(i / step.length);
    const int64_t n = i % step.length, begin = std::min<int64_t>(chunk * size, step.codes);
    const int64_t end = std::min<int64_t>(begin + size, step.codes);
    const int64_t* const state = args.state + i * kColumns;
    int64_t* const partial = args.partials + item * width;
    const RowIntegers& row = step.integers[b];
    const RowFloats& numbers = step.floats[b];
    const float scale = usable_draw_scale(numbers.draw_scale) ? numbers.draw_scale : 0.0f;
    std::fill(partial, partial + width, 0);
    if (begin == end || state[kKind] == kNoKind ||
        !works(args.stage, row, scale, args.all_codes, args.needs.law)) {
      continue;
    }
    const int64_t cond = begin + row_offset(step.rows, step.cond_rows_count, step.cond_stride_b,
                                            step.cond_stride_n, b, n, step.length);
    const int64_t uncond = begin + row_offset(step.uncond_rows, step.uncond_rows_count, step.uncond_stride_b,
                                              step.uncond_stride_n, b, n, step.length);
    const LogitRow logits = {row_at(step, step.cond, cond),
                             row_at(step, step.uncond, uncond),
                             nullptr,
                             nullptr,
                             step.dtype,
                             static_cast<int32_t>(end - begin),
                             row.top_k,
                             row.top_p,
                             step.model_law,
                             args.needs};
    const ChunkOfCodes codes = {args.stage, args.shift, static_cast<int32_t>(args.first_code + begin),
                                state[kOwner] == args.first_chunk + chunk};
    compute(logits, numbers, codes, state, partial);
  }
  return nullptr;
}

}  // namespace titok
