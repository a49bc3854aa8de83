// What the GPU kernels of both decode steps share: folds over a block, rows of logits, searches in cumulative weights
// and in keys. This file holds device code alone, so that tests/cuda_host can build it for the CPU.
//
// A row is cut into segments of 256 codes. A warp computes the weights of a segment at a time, eight neighbouring
// codes in each lane. Sums of integers do not depend on their order, so results are those of the CPU for every block
// size.
#pragma once

#include "common/decode.h"
#include "common/float16.h"

namespace titok {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kPerLane = kSegment / 32;  // neighbouring codes of a lane
constexpr uint64_t kNoKey = ~uint64_t{0};

TITOK_HD int segments_of(int codes) { return (codes + kSegment - 1) / kSegment; }

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
  bool last;  // of `is_last_to_arrive`
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

// Eight logits as memory holds them.
template <class T>
struct alignas(16) RawLogits {
  T value[kPerLane];
};

// The finite logits y of a row, eight at a time.
template <class T>
struct RowLoader {
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
      y[i] = first + i < codes ? finite_logit(logit, inverse_temperature) : -kInfinity;
    }
  }

  __device__ void logits(int first, float (&y)[kPerLane]) const {
    RawLogits<T> given, base{};
    fetch(cond, first, given);
    if (uncond != nullptr) fetch(uncond, first, base);
    finish(first, given, base, y);
  }
};

// The logits of position n of row b. `args` is that of either decode step.
template <class T, class Args>
__device__ RowLoader<T> row_of(const Args& args, int64_t b, int64_t n, float guidance, float inverse_temperature) {
  const bool guided = args.uncond != nullptr && guidance != 1.0f;
  RowLoader<T> row = {
      static_cast<const T*>(args.cond) +
          row_offset(args.rows, args.cond_rows_count, args.cond_stride_b, args.cond_stride_n, b, n, args.length),
      guided ? static_cast<const T*>(args.uncond) + row_offset(args.uncond_rows, args.uncond_rows_count,
                                                               args.uncond_stride_b, args.uncond_stride_n, b, n,
                                                               args.length)
             : nullptr,
      args.codes,
      guidance,
      inverse_temperature,
      false};
  row.packed = args.codes % kPerLane == 0 &&
               (reinterpret_cast<uintptr_t>(row.cond) | reinterpret_cast<uintptr_t>(row.uncond)) % 16 == 0;
  return row;
}

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

// The segment in which unit `left` of a row's weights lies, from the sums of its segments, for one warp. `left` becomes
// the unit's number inside that segment.
__device__ inline int find_segment(const uint64_t* sums, int segments, uint64_t& left, int lane) {
  const int each = (segments + 31) / 32;  // neighbouring segments whose sums a lane adds up
  uint64_t own = 0;
  for (int i = 0; i < each; ++i) own += lane * each + i < segments ? sums[lane * each + i] : 0;
  int segment = find_lane(own, left, lane) * each;
  while (left >= sums[segment]) left -= sums[segment++];
  return segment;
}

// The code in which unit `left` of the weights of codes first ... first + 255 lies, for one warp. Returns true in the
// lane that has the code, and there sets `code` and its logit.
template <class T, class Weigh>
__device__ bool find_code(const RowLoader<T>& row, int first, uint64_t left, int lane, Weigh weigh, int& code,
                          float& logit) {
  float y[kPerLane];
  uint32_t weight[kPerLane];
  first += lane * kPerLane;
  row.logits(first, y);
  uint64_t own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    weight[i] = weigh(y[i]);
    own += weight[i];
  }
  if (find_lane(own, left, lane) != lane) return false;
  code = -1;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (code >= 0) continue;
    if (left < weight[i]) {
      code = first + i;
      logit = y[i];
    } else {
      left -= weight[i];
    }
  }
  return true;
}

// The sum of the weights of a segment, for one warp. The 16-bit halves are summed apart, so that 32 bits suffice.
__device__ inline uint64_t sum_of_warp(const uint32_t (&weight)[kPerLane]) {
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    low += weight[i] & 0xFFFFu;
    high += weight[i] >> 16;
  }
  low = __reduce_add_sync(kAllLanes, low);
  high = __reduce_add_sync(kAllLanes, high);
  return low + (uint64_t{high} << 16);
}

// The largest of the `rank` smallest of `length` keys, for the whole block: a radix search, bit by bit. Keys are
// distinct but for kNoKey. 0 where rank is 0.
template <int kThreads>
__device__ uint64_t largest_of_smallest(const uint64_t* keys, int length, uint32_t rank,
                                        Exchange<kThreads / 32>& exchange, int& turn) {
  uint64_t limit = 0;
  for (int bit = kKeyBits - 1; bit >= 0 && rank > 0; --bit) {
    uint32_t below = 0;  // keys whose higher bits are those of `limit` and whose bit is 0
    for (int n = threadIdx.x; n < length; n += kThreads) below += (keys[n] >> bit) == (limit >> bit);
    below = fold_block<Fold::kSum>(below, exchange, turn);
    if (rank == below) return limit | ((uint64_t{1} << bit) - 1);
    if (rank > below) {
      rank -= below;
      limit |= uint64_t{1} << bit;
    }
  }
  return limit;
}

// Whether this block is the last of `count` to arrive, for the whole block. The last one resets the counter, and sees
// what the others wrote before they arrived.
template <int kWarps>
__device__ bool is_last_to_arrive(uint32_t* arrivals, uint32_t count, Exchange<kWarps>& exchange) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    exchange.last = atomicInc(arrivals, count - 1) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return exchange.last;
}

}  // namespace titok
