// One step of MaskGIT's decoding on the GPU (titok/ops/maskgit_decode_step.py states the definition). This file
// holds device code alone, so that tests/cuda_host can build it for the CPU.
//
// One block draws the code of one position. The block that finishes last in a sample selects which of its
// positions stay masked.
//
// The draw is inverse transform sampling on integers. The sums of the weights of all segments lie in shared memory. The
// search first walks over these sums, then over the codes of one segment.
#pragma once

#include "common/decode_block.cuh"
#include "maskgit_decode/maskgit_decode.h"

namespace titok {

// Bytes of dynamic shared memory: first a sum for each segment, later a selection key for each position of the
// sample.
TITOK_HD int shared_bytes(const DecodeArgs& args) {
  const int segments = segments_of(args.codes);
  return (segments > args.length ? segments : args.length) * static_cast<int>(sizeof(uint64_t));
}

// One warp draws the code of a row from the sums of its segments, and writes the code and its confidence.
template <class T>
__device__ void draw(const DecodeArgs& args, const DecodeParams& params, const RowLoader<T>& row, float top,
                     const uint64_t* sums, const DecodeNoise& noise, int64_t at) {
  const int lane = threadIdx.x % 32, segments = segments_of(args.codes);
  uint64_t own = 0;
  for (int i = lane; i < segments; i += 32) own += sums[i];
  const int64_t total = static_cast<int64_t>(__shfl_sync(kAllLanes, running_sum(own, lane), 31));
  uint64_t left = static_cast<uint64_t>(scale_fraction(noise.uniform, total));
  const int segment = find_segment(sums, segments, left, lane);
  const auto weigh = [&](float y) { return static_cast<uint32_t>(exp_weight((y - top) * params.draw_scale)); };
  int code;
  float drawn;
  if (!find_code(row, segment * kSegment, left, lane, weigh, code, drawn)) return;
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
  const RowLoader<T> row = row_of<T>(args, b, n, params.guidance, params.inverse_temperature);
  const bool guided = row.uncond != nullptr;

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
  float most = -kInfinity;
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
  const float top = from_sortable(fold_block<Fold::kMax>(sortable(most), exchange, turn));
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
      uint32_t weight[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) weight[i] = exp_weight((y[i] - top) * params.draw_scale);
      const uint64_t sum = sum_of_warp(weight);
      if (lane == 0 && segment < segments) sums[segment] = sum;
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

// The whole block selects the positions of sample b that stay masked, once all its codes are drawn. Keys are
// distinct, so exactly the wanted number stays.
template <int kThreads>
__device__ void select(const DecodeArgs& args, const DecodeParams& params, int b, uint64_t* keys,
                       Exchange<kThreads / 32>& exchange, int& turn) {
  const int64_t base = int64_t{b} * args.length;
  const volatile int32_t* drawn = args.drawn + base;  // volatile, because other blocks wrote these
  const volatile float* confidence = args.confidence + base;
  uint32_t masked = 0;
  for (int n = threadIdx.x; n < args.length; n += kThreads) {
    keys[n] = drawn[n] >= 0 ? key_of(sortable(confidence[n]), n) : kNoKey;
    masked += drawn[n] >= 0;
  }
  masked = fold_block<Fold::kSum>(masked, exchange, turn);
  const uint32_t keep = positions_kept(args, params, b, static_cast<int>(masked));

  const uint64_t limit = largest_of_smallest<kThreads>(keys, args.length, keep, exchange, turn);
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
    args.confidence[at] = kInfinity;
  }
  if (is_last_to_arrive(&args.arrivals[b], args.length, exchange)) {
    select<kThreads>(args, params, b, shared, exchange, turn);
  }
}

}  // namespace titok
