// One step of MaskGIT's decoding on the GPU (titok/ops/maskgit_decode_step.py states the definition). This file
// holds device code alone, so that tests/cuda_host can build it for the CPU.
//
// One block draws the code of one position. The block that finishes last in a sample selects which of its
// positions stay masked.
//
// The draw is inverse transform sampling on integers. A row is cut into segments of 256 codes. A warp computes the
// weights of a segment at a time, eight neighbouring codes in each lane, and leaves their sum in shared memory.
// The search first walks over these sums, then over the codes of one segment. Sums of integers do not depend on
// their order, so the drawn code is that of the CPU for every block size.
#pragma once

#include "common/float16.h"
#include "maskgit_decode/maskgit_decode.h"

namespace titok {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kPerLane = 8;              // neighbouring codes of a lane
constexpr int kSegment = 32 * kPerLane;  // codes of a warp
constexpr uint64_t kNoKey = ~uint64_t{0};

TITOK_HD int segments_of(int codes) { return (codes + kSegment - 1) / kSegment; }

// Bytes of dynamic shared memory: first a sum for each segment, later a selection key for each position of the
// sample.
TITOK_HD int shared_bytes(const DecodeArgs& args) {
  const int segments = segments_of(args.codes);
  return (segments > args.length ? segments : args.length) * static_cast<int>(sizeof(uint64_t));
}

#if defined(__CUDACC__)
__device__ inline uint64_t* dynamic_shared() {
  extern __shared__ uint64_t words[];
  return words;
}
#else
uint64_t* dynamic_shared();  // tests/cuda_host defines it
#endif

// Shared memory through which the warps of a block exchange values. Consecutive exchanges alternate between two
// slots, so that one barrier is enough for each.
template <int kWarps>
struct Exchange {
  uint32_t slot[2][kWarps];
  bool last;  // whether this block finishes its sample
};

enum class Fold { kMax, kMin, kSum };

// Folds a value of every thread; all threads get the result. `turn` is the slot to use and changes with each call.
template <Fold kFold, int kWarps>
__device__ uint32_t fold_block(uint32_t value, Exchange<kWarps>& exchange, int& turn) {
  const auto fold_warp = [](uint32_t x) {
    return kFold == Fold::kMax   ? __reduce_max_sync(kAllLanes, x)
           : kFold == Fold::kMin ? __reduce_min_sync(kAllLanes, x)
                                 : __reduce_add_sync(kAllLanes, x);
  };
  value = fold_warp(value);
  uint32_t* slot = exchange.slot[turn];
  turn ^= 1;
  if (threadIdx.x % 32 == 0) slot[threadIdx.x / 32] = value;
  __syncthreads();
  value = slot[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    const uint32_t other = slot[warp];
    value = kFold == Fold::kSum ? value + other : (kFold == Fold::kMax) == (other > value) ? other : value;
  }
  return value;
}

// Integers that sort like the floats.
TITOK_HD uint32_t ordered_bits(float x) { return static_cast<uint32_t>(selection_key(x, 0) >> 12); }

TITOK_HD float from_ordered_bits(uint32_t ordered) {
  return bit_cast<float>(ordered & 0x80000000u ? ordered & 0x7FFFFFFFu : ~ordered);
}

// Eight logits as memory holds them.
template <class T>
struct alignas(16) RawLogits {
  T value[kPerLane];
};

// The finite logits y of a row, eight at a time.
template <class T>
struct LogitRow {
  const T* cond;    // (codes)
  const T* uncond;  // (codes), or null: no guidance
  int codes;
  float guidance, inverse_temperature;
  bool packed;  // loads of 16 bytes: both rows are aligned, and their number of codes is a multiple of eight

  __device__ void fetch(const T* from, int first, RawLogits<T>& to) const {
    if (packed) {
      constexpr int kLoads = sizeof(to) / 16;
      uint4 load[kLoads] = {};
      if (first < codes) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) load[i] = __ldg(reinterpret_cast<const uint4*>(from + first) + i);
      }
      to = bit_cast<RawLogits<T>>(load);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) to.value[i] = first + i < codes ? from[first + i] : T{};
    }
  }

  // y of codes first ... first + 7; -inf past the last code, whose weight is 0.
  __device__ void finish(int first, const RawLogits<T>& given, const RawLogits<T>& base,
                         float (&y)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      float logit = to_float(given.value[i]);
      if (uncond != nullptr) logit = guide(logit, to_float(base.value[i]), guidance);
      y[i] = first + i < codes ? finite_logit(logit, inverse_temperature) : bit_cast<float>(0xFF800000u);
    }
  }

  __device__ void logits(int first, float (&y)[kPerLane]) const {
    RawLogits<T> given, base{};
    fetch(cond, first, given);
    if (uncond != nullptr) fetch(uncond, first, base);
    finish(first, given, base, y);
  }
};

// Inclusive prefix sum over the lanes of a warp.
__device__ inline uint64_t running_sum(uint64_t value, int lane) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// The lane in which unit `left` lies, when lane i holds `own` units after those of the lanes before it. `left`
// becomes the unit's number inside that lane.
__device__ inline int find_lane(uint64_t own, uint64_t& left, int lane) {
  const uint64_t until = running_sum(own, lane);
  const int found = __ffs(__ballot_sync(kAllLanes, until > left)) - 1;
  left -= __shfl_sync(kAllLanes, until - own, found);
  return found;
}

// One warp draws the code of a row from the sums of its segments, and writes the code and its confidence.
template <class T>
__device__ void draw(const DecodeArgs& args, const DecodeParams& params, const LogitRow<T>& row, float top,
                     const uint64_t* sums, const DecodeNoise& noise, int64_t at) {
  const int lane = threadIdx.x % 32, segments = segments_of(args.codes);
  const int each = (segments + 31) / 32;  // neighbouring segments whose sums a lane adds up
  uint64_t own = 0;
  for (int i = 0; i < each; ++i) own += lane * each + i < segments ? sums[lane * each + i] : 0;
  const uint64_t total = __shfl_sync(kAllLanes, running_sum(own, lane), 31);
  uint64_t left = scale_uniform(noise.uniform, total);
  int segment = find_lane(own, left, lane) * each;
  while (left >= sums[segment]) left -= sums[segment++];

  float y[kPerLane];
  uint32_t weight[kPerLane];
  const int first = segment * kSegment + lane * kPerLane;
  row.logits(first, y);
  own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    weight[i] = exp_weight((y[i] - top) * params.draw_scale);
    own += weight[i];
  }
  if (find_lane(own, left, lane) != lane) return;
  int code = -1;
  float drawn = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (code >= 0) continue;
    if (left < weight[i]) {
      code = first + i;
      drawn = y[i];
    } else {
      left -= weight[i];
    }
  }
  const float score = args.maskgit ? log_probability((drawn - top) * params.draw_scale, total) : drawn;
  args.drawn[at] = code;
  args.confidence[at] = noisy_confidence(score, noise.gumbel_word, params.noise);
}

// The whole block draws the code of position n of sample b. With kRounds > 0 the row stays in registers, and a
// warp has that many segments. With kRounds = 0 the row is read from the caches again, and any number of codes
// will do.
template <class T, int kThreads, int kRounds>
__device__ void decide(const DecodeArgs& args, const DecodeParams& params, int b, int n, uint64_t* sums,
                       Exchange<kThreads / 32>& exchange, int& turn) {
  constexpr int kWarps = kThreads / 32, kHeld = kRounds > 0 ? kRounds : 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segments = segments_of(args.codes);
  const int rounds = kRounds > 0 ? kRounds : (segments + kWarps - 1) / kWarps;
  const int64_t at = int64_t{b} * args.length + n;
  const auto first_of = [=](int round) { return (round * kWarps + warp) * kSegment + lane * kPerLane; };
  const bool guided = args.uncond != nullptr && params.guidance != 1.0f;
  LogitRow<T> row = {
      static_cast<const T*>(args.cond) +
          row_offset(args.rows, args.cond_rows_count, args.cond_stride_b, args.cond_stride_n, b, n, args.length),
      guided ? static_cast<const T*>(args.uncond) + row_offset(args.uncond_rows, args.uncond_rows_count,
                                                               args.uncond_stride_b, args.uncond_stride_n, b, n,
                                                               args.length)
             : nullptr,
      args.codes,
      params.guidance,
      params.inverse_temperature,
      false};
  row.packed = args.codes % kPerLane == 0 &&
               (reinterpret_cast<uintptr_t>(row.cond) | reinterpret_cast<uintptr_t>(row.uncond)) % 16 == 0;

  // All loads of rows that stay in registers are issued before the first is used.
  RawLogits<T> given[kHeld], base[kHeld] = {};
  if (kRounds > 0) {
#pragma unroll
    for (int round = 0; round < kHeld; ++round) row.fetch(row.cond, first_of(round), given[round]);
    if (guided) {
#pragma unroll
      for (int round = 0; round < kHeld; ++round) row.fetch(row.uncond, first_of(round), base[round]);
    }
  }
  float held[kHeld][kPerLane];
  float most = bit_cast<float>(0xFF800000u);
#pragma unroll kHeld
  for (int round = 0; round < rounds; ++round) {
    float (&y)[kPerLane] = held[kRounds > 0 ? round : 0];
    if (kRounds > 0) {
      row.finish(first_of(round), given[round], base[round], y);
    } else {
      row.logits(first_of(round), y);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) most = y[i] > most ? y[i] : most;
  }
  const float top = from_ordered_bits(fold_block<Fold::kMax>(ordered_bits(most), exchange, turn));
  const DecodeNoise noise = decode_noise(params.seed, params.first_sample + b, params.step, n);

  uint32_t first_top = kAllLanes;
#pragma unroll kHeld
  for (int round = 0; round < rounds; ++round) {
    float (&y)[kPerLane] = held[kRounds > 0 ? round : 0];
    const int segment = round * kWarps + warp, first = first_of(round);
    if (kRounds == 0) row.logits(first, y);
    if (params.draw_scale == 0.0f) {
#pragma unroll
      for (int i = kPerLane - 1; i >= 0; --i) {
        if (y[i] == top && static_cast<uint32_t>(first + i) < first_top) first_top = first + i;
      }
    } else {
      uint32_t low = 0, high = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const uint32_t weight = exp_weight((y[i] - top) * params.draw_scale);
        low += weight & 0xFFFFu;
        high += weight >> 16;
      }
      low = __reduce_add_sync(kAllLanes, low);
      high = __reduce_add_sync(kAllLanes, high);
      if (lane == 0 && segment < segments) sums[segment] = low + (uint64_t{high} << 16);
    }
  }

  if (params.draw_scale == 0.0f) {
    const uint32_t code = fold_block<Fold::kMin>(first_top, exchange, turn);
    if (threadIdx.x == 0) {
      args.drawn[at] = static_cast<int32_t>(code);
      args.confidence[at] = noisy_confidence(top, noise.gumbel_word, params.noise);
    }
  } else {
    __syncthreads();
    if (warp == 0) draw(args, params, row, top, sums, noise, at);
  }
}

// The whole block writes the order of the positions of sample b, of which `keep` stay masked: those whose key is at
// most `limit`.
template <int kThreads>
__device__ void write_order(const DecodeArgs& args, int b, uint32_t keep, uint64_t limit, const uint64_t* keys,
                            Exchange<kThreads / 32>& exchange, int& turn) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t* const positions = args.order + int64_t{b} * args.length;
  int64_t* const places = positions + int64_t{args.batch} * args.length;
  uint32_t before = 0;  // positions below `first` that stay masked
  for (int first = 0; first < args.length; first += kThreads) {
    const int n = first + static_cast<int>(threadIdx.x);
    const bool stays = n < args.length && keep > 0 && keys[n] <= limit;
    const uint32_t votes = __ballot_sync(kAllLanes, stays);
    uint32_t* slot = exchange.slot[turn];
    turn ^= 1;
    if (lane == 0) slot[warp] = __popc(votes);
    __syncthreads();
    uint32_t below = before + __popc(votes & ((1u << lane) - 1));  // positions below n that stay masked
    for (int other = 0; other < kThreads / 32; ++other) {
      if (other < warp) below += slot[other];
      before += slot[other];
    }
    if (n >= args.length) continue;
    const uint32_t place = stays ? below : keep + static_cast<uint32_t>(n) - below;
    positions[place] = n;
    places[n] = place;
  }
}

// The whole block selects the positions of sample b that stay masked, once all its codes are drawn: a radix
// search, bit by bit, for the largest key among them. Keys are distinct, so exactly the wanted number stays.
template <int kThreads>
__device__ void select(const DecodeArgs& args, const DecodeParams& params, int b, uint64_t* keys,
                       Exchange<kThreads / 32>& exchange, int& turn) {
  const int64_t base = int64_t{b} * args.length;
  const volatile int32_t* drawn = args.drawn + base;  // volatile, because other blocks wrote these
  const volatile float* confidence = args.confidence + base;
  uint32_t masked = 0;
  for (int n = threadIdx.x; n < args.length; n += kThreads) {
    keys[n] = drawn[n] >= 0 ? selection_key(confidence[n], n) : kNoKey;
    masked += drawn[n] >= 0;
  }
  masked = fold_block<Fold::kSum>(masked, exchange, turn);
  const uint32_t keep = positions_kept(args, params, b, static_cast<int>(masked));

  uint64_t limit = 0;
  uint32_t rank = keep;
  for (int bit = kKeyBits - 1; bit >= 0 && keep > 0; --bit) {
    uint32_t below = 0;  // keys whose higher bits are those of `limit` and whose bit is 0
    for (int n = threadIdx.x; n < args.length; n += kThreads) below += (keys[n] >> bit) == (limit >> bit);
    below = fold_block<Fold::kSum>(below, exchange, turn);
    if (rank == below) {
      limit |= (uint64_t{1} << bit) - 1;
      break;
    }
    if (rank > below) {
      rank -= below;
      limit |= uint64_t{1} << bit;
    }
  }
  for (int n = threadIdx.x; n < args.length; n += kThreads) {
    const int32_t code = drawn[n];
    const int64_t token = code >= 0 ? code : args.tokens[base + n];
    args.out[base + n] = keep > 0 && keys[n] <= limit ? args.mask_token : token;
  }
  if (args.order != nullptr) write_order<kThreads>(args, b, keep, limit, keys, exchange, turn);
}

// Grid: batch * length blocks of kThreads. Dynamic shared memory: shared_bytes(args).
template <class T, int kThreads, int kRounds>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    maskgit_decode_kernel(const __grid_constant__ DecodeArgs args) {
  uint64_t* const shared = dynamic_shared();
  __shared__ Exchange<kThreads / 32> exchange;
  int turn = 0;
  const int b = blockIdx.x / args.length, n = blockIdx.x % args.length;
  const int64_t at = int64_t{b} * args.length + n;
  DecodeParams params = args.params_at != nullptr ? *args.params_at : args.params;
  if (!usable_draw_scale(params.draw_scale)) params.draw_scale = 0.0f;  // device memory came unchecked
  if (args.tokens[at] == args.mask_token) {
    decide<T, kThreads, kRounds>(args, params, b, n, shared, exchange, turn);
  } else if (threadIdx.x == 0) {
    args.drawn[at] = -1;
    args.confidence[at] = bit_cast<float>(0x7F800000u);
  }
  // The last block of the sample to arrive resets the counter, and sees what the others wrote before they arrived.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    exchange.last = atomicInc(&args.arrivals[b], args.length - 1) == static_cast<uint32_t>(args.length - 1);
    __threadfence();
  }
  __syncthreads();
  if (exchange.last) select<kThreads>(args, params, b, shared, exchange, turn);
}

}  // namespace titok
