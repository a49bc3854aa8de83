// One decode step of a masked or uniform-state generator on the GPU (titok/ops/masked_decode_step.py states the
// definition, titok/ops/masked_decode_split.py the stages). This file holds device code alone, so that tests/cuda_host
// can build it for the CPU. It is longer than 400 lines, because the stages and the policy share the state of a
// position.
//
// A kernel with one block for each row finds the candidates. Each stage is a kernel with one block for each chunk of
// codes of each position: the block computes a partial result, and the block of a position that finishes last reduces
// those of all chunks into the position's state. A last kernel with one block for each row applies the policy. Partial
// results are reduced by maxima and sums of integers, so that the number of chunks changes no bit.
#pragma once

#include "common/decode_block.cuh"
#include "masked_decode/masked_decode.h"

namespace titok {

TITOK_HD int64_t* state_of(const GpuDecodeArgs& args, int64_t position) { return args.state + position * kColumns; }

TITOK_HD float draw_scale_of(const RowFloats& row) {  // device memory came unchecked
  return usable_draw_scale(row.draw_scale) ? row.draw_scale : 0.0f;
}

// ---- The candidates

// Grid: batch blocks of kThreads. Writes the kind of every position of a row and resets its counters.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    masked_decode_candidates_kernel(const __grid_constant__ GpuDecodeArgs args) {
  __shared__ Exchange<kThreads / 32> exchange;
  int turn = 0;
  const MaskedDecodeArgs& step = args.step;
  const RowIntegers& row = step.integers[blockIdx.x];
  const int64_t base = int64_t{blockIdx.x} * step.length;
  const int64_t start = row.start > 0 ? row.start : 0;
  const auto is_undecided = [&](int64_t n) {
    return step.undecided != nullptr ? step.undecided[base + n] : step.tokens[base + n] == step.mask_token;
  };
  int64_t first = start, end = row.end < step.length ? row.end : step.length;
  if (step.block_length > 0) {
    uint32_t found = kAllLanes;
    for (int64_t n = start + threadIdx.x; n < end; n += kThreads) {
      if (is_undecided(n) && n < found) found = static_cast<uint32_t>(n);
    }
    found = fold_block<Fold::kMin>(found, exchange, turn);
    first = start + (int64_t{found} - start) / step.block_length * step.block_length;
    end = found == kAllLanes ? 0 : end < first + step.block_length ? end : first + step.block_length;
  }
  for (int64_t n = threadIdx.x; n < step.length; n += kThreads) {
    int64_t kind = kNoKind;
    if (n >= first && n < end) {
      if (is_undecided(n)) {
        kind = kCandidateKind;
      } else if (step.edits && (step.editable == nullptr || step.editable[base + n])) {
        kind = kEditableKind;
      }
    }
    state_of(args, base + n)[kKind] = kind;
    args.arrivals[base + n] = 0;
  }
}

// ---- Partial results of a chunk. Every thread of the block calls these; they write at `partial`.

// Calls visit(first, y) for the logits of each thread's codes of [begin, end), eight at a time; -inf past the end.
template <int kThreads, class T, class Visit>
__device__ void each_code(const RowLoader<T>& row, int begin, int end, Visit visit) {
  for (int first = begin + static_cast<int>(threadIdx.x) * kPerLane; first < end; first += kThreads * kPerLane) {
    float y[kPerLane];
    row.logits(first, y);
    visit(first, y);
  }
}

template <int kThreads, class T>
__device__ void find_peak(const RowLoader<T>& row, int begin, int end, Exchange<kThreads / 32>& exchange, int& turn,
                          int64_t* partial) {
  float top = -kInfinity, second = top;
  uint32_t code = kAllLanes;
  each_code<kThreads>(row, begin, end, [&](int first, const float (&logits)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float y = logits[i] + 0.0f;  // no negative zero, which would sort apart
      const float lesser = y < top ? y : top;
      second = lesser > second ? lesser : second;
      code = y > top ? static_cast<uint32_t>(first + i) : code;
      top = y > top ? y : top;
    }
  });
  const uint32_t largest = fold_block<Fold::kMax>(sortable(top), exchange, turn);
  const uint32_t winner = fold_block<Fold::kMin>(sortable(top) == largest ? code : kAllLanes, exchange, turn);
  // Of the winner's thread the second largest logit remains, of every other thread the largest.
  const uint32_t next = fold_block<Fold::kMax>(sortable(code == winner ? second : top), exchange, turn);
  if (threadIdx.x != 0) return;
  partial[0] = int64_t{largest} << kCodeBits | (static_cast<int64_t>(winner) ^ kCodeMask);
  partial[1] = next;
}

// Sums of the masses of the logits that begin with the digits `found` so far, by their next digit.
template <int kThreads, class T, class Mass>
__device__ void sum_by_digit(const RowLoader<T>& row, int begin, int end, int shift, int64_t found, Mass mass_of,
                             int64_t* partial) {
  // Each warp sums for itself, the 16-bit halves of the masses apart, so that 32 bits suffice.
  __shared__ uint32_t halves[2][kThreads / 32][kDigits];
  for (int i = threadIdx.x; i < 2 * kThreads / 32 * kDigits; i += kThreads) (&halves[0][0][0])[i] = 0;
  __syncthreads();
  const int warp = threadIdx.x / 32;
  each_code<kThreads>(row, begin, end, [&](int, const float (&logits)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float y = logits[i] + 0.0f;
      const int64_t number = sortable(y);
      const uint32_t mass = mass_of(y);
      if (mass == 0 || number >> (shift + kDigitBits) != found >> (shift + kDigitBits)) continue;
      const int digit = static_cast<int>(number >> shift) & (kDigits - 1);
      atomicAdd(&halves[0][warp][digit], mass & 0xFFFFu);
      atomicAdd(&halves[1][warp][digit], mass >> 16);
    }
  });
  __syncthreads();
  if (threadIdx.x >= kDigits) return;
  int64_t sum = 0;
  for (int other = 0; other < kThreads / 32; ++other) {
    sum += halves[0][other][threadIdx.x] + (int64_t{halves[1][other][threadIdx.x]} << 16);
  }
  partial[threadIdx.x] = sum;
}

// A sum of 30-bit integers over the block.
struct WideSum {
  uint32_t low = 0, high = 0;
  __device__ void add(uint32_t value) {
    low += value & 0xFFFFu;
    high += value >> 16;
  }
  template <int kWarps>
  __device__ int64_t over_block(Exchange<kWarps>& exchange, int& turn) const {
    const uint32_t lows = fold_block<Fold::kSum>(low, exchange, turn);
    return lows + (int64_t{fold_block<Fold::kSum>(high, exchange, turn)} << 16);
  }
};

// The law softmax((y - top) * scale) of the logits of at least `lowest`.
struct WeightLaw {
  float top, scale, lowest;
  __device__ uint32_t weigh(float y) const {
    return y >= lowest ? static_cast<uint32_t>(exp_weight((y - top) * scale)) : 0;
  }
};

template <int kThreads, class T>
__device__ void sum_weights(const GpuDecodeArgs& args, const RowLoader<T>& row, int begin, int end,
                            const WeightLaw& drawn, Exchange<kThreads / 32>& exchange, int& turn, int64_t* partial) {
  const bool model = args.step.model_law;
  const WeightLaw law = model ? WeightLaw{drawn.top, 1.0f, -kInfinity} : drawn;
  WideSum weights, law_weights, products;
  each_code<kThreads>(row, begin, end, [&](int, const float (&y)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t weight = drawn.weigh(y[i]);
      weights.add(weight);
      if (!args.needs.law) continue;
      const uint32_t law_weight = model ? law.weigh(y[i]) : weight;
      if (model) law_weights.add(law_weight);
      if (!args.needs.entropy) continue;
      float x = (y[i] - law.top) * law.scale;
      x = x > kLowestExponent ? x : kLowestExponent;
      products.add(static_cast<uint32_t>(static_cast<int32_t>(static_cast<float>(static_cast<int32_t>(law_weight)) * -x + 0.5f)));
    }
  });
  const int64_t sum = weights.over_block(exchange, turn);
  const int64_t law_sum = model && args.needs.law ? law_weights.over_block(exchange, turn) : sum;
  const int64_t product_sum = args.needs.entropy ? products.over_block(exchange, turn) : 0;
  if (threadIdx.x != 0) return;
  partial[0] = sum;
  partial[1] = law_sum;
  partial[2] = product_sum;
}

// ---- Reduction of the partial results of a position, by one thread

__device__ inline void reduce_peak(const volatile int64_t* partials, int chunks, const RowIntegers& row,
                                   int64_t* state) {
  int64_t key = 0, second = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int64_t other = partials[chunk * kDigits], next = partials[chunk * kDigits + 1];
    const int64_t lesser = (other < key ? other : key) >> kCodeBits;
    second = lesser > second ? lesser : second;
    second = next > second ? next : second;
    key = other > key ? other : key;
  }
  state[kTop] = state[kLogit] = key >> kCodeBits;
  state[kTopCode] = state[kCode] = (key & kCodeMask) ^ kCodeMask;
  state[kSecond] = second;
  state[kFound] = 0;
  state[kLeft] = row.top_k - 1;
  state[kLowest] = sortable(-kInfinity);
}

__device__ inline void reduce_digit(const volatile int64_t* partials, int chunks, const RowIntegers& row, Stage stage,
                                    int shift, int64_t* state) {
  int64_t masses[kDigits] = {}, total = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
    for (int digit = 0; digit < kDigits; ++digit) masses[digit] += partials[chunk * kDigits + digit];
  }
#pragma unroll
  for (int digit = 0; digit < kDigits; ++digit) total += masses[digit];
  int64_t found = state[kFound], left = state[kLeft];
  if (stage == Stage::kMass && shift == 32 - kDigitBits) {
    found = 0;
    left = scale_fraction(static_cast<uint64_t>(row.top_p) << 32, total);
  }
  // The digit in which unit `left` lies, counted from the largest digit down.
  bool is_found = false;
#pragma unroll
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    if (is_found) continue;
    if (left < masses[digit]) {
      is_found = true;
      found |= int64_t{digit} << shift;
    } else {
      left -= masses[digit];
    }
  }
  state[kFound] = found;
  state[kLeft] = left;
  if (shift == 0 && found > state[kLowest]) state[kLowest] = found;
}

__device__ inline void reduce_sums(const volatile int64_t* partials, int chunks, uint64_t uniform, int64_t* state) {
  int64_t drawn = 0, law = 0, products = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    drawn += partials[chunk * kDigits];
    law += partials[chunk * kDigits + 1];
    products += partials[chunk * kDigits + 2];
  }
  int64_t left = scale_fraction(uniform, drawn);
  int owner = 0;
  while (owner < chunks - 1 && left >= partials[owner * kDigits]) left -= partials[owner++ * kDigits];
  state[kOwner] = owner;
  state[kLeft] = left;
  state[kDrawnSum] = drawn;
  state[kLawSum] = law;
  state[kProducts] = products;
}

// ---- The stages

// Grid: batch * length * chunks blocks of kThreads.
template <class T, Stage kStage, int kThreads>
__global__ void __launch_bounds__(kThreads)
    masked_decode_stage_kernel(const __grid_constant__ GpuDecodeArgs args, int shift) {
  __shared__ Exchange<kThreads / 32> exchange;
  int turn = 0;
  const int64_t position = blockIdx.x / args.chunks;
  const int chunk = blockIdx.x % args.chunks;
  const int64_t b = position / args.step.length, n = position % args.step.length;
  const RowIntegers& row = args.step.integers[b];
  const RowFloats& numbers = args.step.floats[b];
  const float draw_scale = draw_scale_of(numbers);
  int64_t* const state = state_of(args, position);
  if (state[kKind] == kNoKind || !works(kStage, row, draw_scale, args.step.codes, args.needs.law)) return;

  const RowLoader<T> logits = row_of<T>(args.step, b, n, numbers.guidance, numbers.inverse_temperature);
  const int begin = chunk * args.chunk;
  const int end = args.step.codes - begin < args.chunk ? args.step.codes : begin + args.chunk;
  int64_t* const partials = args.partials + position * args.chunks * kDigits;
  int64_t* const partial = partials + chunk * kDigits;
  const WeightLaw law = {from_sortable(state[kTop]), draw_scale > 0.0f ? draw_scale : 1.0f,
                         from_sortable(state[kLowest])};
  if (kStage == Stage::kPeak) {
    find_peak<kThreads>(logits, begin, end, exchange, turn, partial);
  } else if (kStage == Stage::kCount) {
    const auto one = [](float y) { return uint32_t{y > -kInfinity}; };
    sum_by_digit<kThreads>(logits, begin, end, shift, state[kFound], one, partial);
  } else if (kStage == Stage::kMass) {
    sum_by_digit<kThreads>(logits, begin, end, shift, state[kFound], [&](float y) { return law.weigh(y); }, partial);
  } else {
    sum_weights<kThreads>(args, logits, begin, end, law, exchange, turn, partial);
  }
  if (!is_last_to_arrive(&args.arrivals[position], args.chunks, exchange) || threadIdx.x != 0) return;
  if (kStage == Stage::kPeak) {
    reduce_peak(partials, args.chunks, row, state);
  } else if (kStage == Stage::kSums) {
    reduce_sums(partials, args.chunks, decode_noise(row, n).uniform, state);
  } else {
    reduce_digit(partials, args.chunks, row, kStage, shift, state);
  }
}

// Grid: batch * length blocks of kThreads. Finds the drawn code of a position in its chunk.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) masked_decode_find_kernel(const __grid_constant__ GpuDecodeArgs args) {
  __shared__ uint64_t sums[kMostChunk / kSegment];
  const int64_t position = blockIdx.x, b = position / args.step.length, n = position % args.step.length;
  const RowFloats& numbers = args.step.floats[b];
  const float draw_scale = draw_scale_of(numbers);
  int64_t* const state = state_of(args, position);
  if (state[kKind] == kNoKind || draw_scale == 0.0f) return;
  const RowLoader<T> logits = row_of<T>(args.step, b, n, numbers.guidance, numbers.inverse_temperature);
  const WeightLaw law = {from_sortable(state[kTop]), draw_scale, from_sortable(state[kLowest])};
  const auto weigh = [&](float y) { return law.weigh(y); };
  const int begin = static_cast<int>(state[kOwner]) * args.chunk;
  const int end = args.step.codes - begin < args.chunk ? args.step.codes : begin + args.chunk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segments = segments_of(end - begin);
  for (int segment = warp; segment < segments; segment += kThreads / 32) {
    float y[kPerLane];
    uint32_t weight[kPerLane];
    logits.logits(begin + segment * kSegment + lane * kPerLane, y);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) weight[i] = weigh(y[i]);
    const uint64_t sum = sum_of_warp(weight);
    if (lane == 0) sums[segment] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
  uint64_t left = static_cast<uint64_t>(state[kLeft]);
  const int segment = find_segment(sums, segments, left, lane);
  int code;
  float y;
  if (!find_code(logits, begin + segment * kSegment, left, lane, weigh, code, y)) return;
  state[kCode] = code;
  state[kLogit] = sortable(y + 0.0f);
}

// ---- The policy

// What was drawn at a position that was evaluated, and the confidence.
__device__ inline DrawnToken evaluate(const GpuDecodeArgs& args, const RowFloats& numbers, const int64_t* state,
                                      const DecodeNoise& noise, float& confidence) {
  DrawnToken drawn = {static_cast<int32_t>(state[kCode]), from_sortable(state[kLogit]), 0.0f, 0.0f, 0.0f};
  if (args.needs.law) {
    const float draw_scale = draw_scale_of(numbers);
    const float scale = draw_scale > 0.0f && !args.step.model_law ? draw_scale : 1.0f;
    const float top = from_sortable(state[kTop]), second = from_sortable(state[kSecond]);
    const bool is_kept = args.step.model_law || second >= from_sortable(state[kLowest]);
    const int64_t other = is_kept ? exp_weight((second - top) * scale) : 0;
    evaluate_law(drawn, top, scale, state[kLawSum], state[kProducts], other);
  }
  confidence = noisy_confidence(score_of(args.step.confidence, drawn), noise.gumbel_word, numbers.noise);
  return drawn;
}

// The sum of integers below 2^44 over the block; each thread gives the sum of at most 64 of them.
template <int kThreads>
__device__ int64_t sum_over_row(uint64_t value, Exchange<kThreads / 32>& exchange, int& turn) {
  const uint32_t low = fold_block<Fold::kSum>(static_cast<uint32_t>(value & 0xFFFFFu), exchange, turn);
  const uint32_t high = fold_block<Fold::kSum>(static_cast<uint32_t>(value >> 20), exchange, turn);
  return static_cast<int64_t>(low) + (int64_t{high} << 20);
}

// Whether the policy accepts the candidates up to a key by its sum alone; monotone in the key.
template <int kThreads>
__device__ bool is_within_bound(const MaskedDecodeArgs& step, const RowFloats& numbers, const uint64_t* keys,
                                       uint64_t tried, Exchange<kThreads / 32>& exchange, int& turn) {
  if (step.policy == Policy::kEntropy) {
    uint64_t before = 0;
    for (int n = threadIdx.x; n < step.length; n += kThreads) before += keys[n] < tried ? keys[n] >> 12 : 0;
    return sum_over_row<kThreads>(before, exchange, turn) <= static_cast<int64_t>(numbers.limit * kEntropyUnit);
  }
  uint32_t count = 0, largest = 0;
  for (int n = threadIdx.x; n < step.length; n += kThreads) {
    if (keys[n] > tried) continue;
    ++count;
    const uint32_t number = static_cast<uint32_t>(keys[n] >> 12);
    largest = number > largest ? number : largest;
  }
  count = fold_block<Fold::kSum>(count, exchange, turn);
  largest = fold_block<Fold::kMax>(largest, exchange, turn);
  if (count == 0) return true;
  const int64_t doubt = static_cast<int64_t>(kOne) - exp_weight(from_sortable(int64_t{~largest}));
  return (int64_t{count} + 1) * doubt < static_cast<int64_t>(numbers.limit * kOne);
}

// Grid: batch blocks of kThreads. Dynamic shared memory: a key for each position of the row.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) masked_decode_accept_kernel(const __grid_constant__ GpuDecodeArgs args) {
  uint64_t* const keys = dynamic_shared();
  __shared__ Exchange<kThreads / 32> exchange;
  int turn = 0;
  const MaskedDecodeArgs& step = args.step;
  const RowIntegers& row = step.integers[blockIdx.x];
  const RowFloats& numbers = step.floats[blockIdx.x];
  const int64_t base = int64_t{blockIdx.x} * step.length;
  uint32_t candidates = 0;
  for (int n = threadIdx.x; n < step.length; n += kThreads) {
    int64_t* const state = state_of(args, base + n);
    float confidence = kInfinity, log_probability = 0.0f;
    keys[n] = kNoKey;
    if (state[kKind] != kNoKind) {
      const DrawnToken drawn = evaluate(args, numbers, state, decode_noise(row, n), confidence);
      log_probability = drawn.log_probability;
      if (state[kKind] == kCandidateKind) {
        keys[n] = key_of(sort_number(step.policy, drawn, confidence), n);
        ++candidates;
      }
    }
    state[kFound] = sortable(log_probability);  // read again below, by this thread
    step.confidences[base + n] = confidence;
    if (step.log_probabilities != nullptr) step.log_probabilities[base + n] = log_probability;
  }
  const int64_t number = fold_block<Fold::kSum>(candidates, exchange, turn);
  const int64_t count = row.count < number ? (row.count > 0 ? row.count : 0) : number;
  const uint64_t limit =
      largest_of_smallest<kThreads>(keys, step.length, static_cast<uint32_t>(count), exchange, turn);
  // Policies "entropy" and "factor" also accept up to the largest key that is within the bound, found bit by bit.
  uint64_t most = 0;
  const bool has_bound = step.policy == Policy::kEntropy || step.policy == Policy::kFactor;
  for (int bit = kKeyBits - 1; bit >= 0 && has_bound; --bit) {
    const uint64_t tried = most | uint64_t{1} << bit;
    if (is_within_bound<kThreads>(step, numbers, keys, tried, exchange, turn)) most = tried;
  }
  for (int n = threadIdx.x; n < step.length; n += kThreads) {
    const int64_t* const state = state_of(args, base + n);
    const bool is_candidate = state[kKind] == kCandidateKind;
    const float log_probability = from_sortable(state[kFound]);
    const bool is_first = count > 0 && keys[n] <= limit;
    bool accepted = is_candidate && (step.policy == Policy::kCount ? !is_first : is_first);
    if (step.policy == Policy::kThreshold) accepted |= is_candidate && log_probability > numbers.limit;
    if (has_bound) accepted |= is_candidate && keys[n] <= most;
    int64_t token = step.tokens[base + n];
    accepted |= state[kKind] == kEditableKind && state[kCode] != token && log_probability > numbers.edit_limit;
    if (step.renoise && is_candidate) token = uniform_code(decode_noise(row, n).renoise_word, step.codes);
    step.out[base + n] = accepted ? state[kCode] : token;
    if (step.new_step_map != nullptr) {
      step.new_step_map[base + n] = accepted ? static_cast<int32_t>(row.step) : step.step_map[base + n];
    }
  }
}

}  // namespace titok
