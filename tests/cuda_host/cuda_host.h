// Runs CUDA device code on the host, for tests. The threads of a block are fibers that run in lock-step between
// barriers; blocks run one after another. Threads are resumed in ascending, descending or scrambled order: code without
// a race gives the same result in each.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct Dim {
  unsigned x;
};

namespace cuda_host {

constexpr unsigned kWarp = 32;
enum class Order { kAscending, kDescending, kScrambled };

struct Barrier {
  unsigned size = 0, waiting = 0, generation = 0;
};

struct Block {
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<char> done;
  unsigned current = 0;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;   // two of each lane: consecutive exchanges of a warp alternate
  std::vector<unsigned> parity;  // of each thread
  std::vector<uint64_t> shared;  // dynamic shared memory
  bool progress = false;
  std::function<void()> body;
};

inline Block* block = nullptr;
inline Dim block_index{0};

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  block->progress = true;
  if (++barrier.waiting == barrier.size) {
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&block->fibers[block->current], &block->scheduler);
  block->progress = true;
}

// Every lane of the warp gives a value; returns the values of all lanes.
inline const uint64_t* exchange(uint64_t value) {
  const unsigned thread = block->current, warp = thread / kWarp;
  uint64_t* slots = &block->slots[(2 * warp + (block->parity[thread] ^= 1)) * kWarp];
  slots[thread % kWarp] = value;
  wait(block->warps[warp]);
  return slots;
}

inline void fiber_main() {
  block->body();
  block->done[block->current] = 1;
  block->progress = true;
  swapcontext(&block->fibers[block->current], &block->scheduler);
}

inline void run_block(unsigned index, unsigned threads, unsigned shared_bytes, Order order, std::function<void()> body) {
  Block own;
  block = &own;
  block_index.x = index;
  own.body = std::move(body);
  own.fibers.resize(threads);
  own.done.assign(threads, 0);
  own.parity.assign(threads, 0);
  own.slots.assign(2 * threads, 0);
  own.shared.assign((shared_bytes + 7) / 8, 0xDEADBEEFDEADBEEFull);
  own.all.size = threads;
  own.warps.resize(threads / kWarp);
  for (Barrier& warp : own.warps) warp.size = kWarp;
  constexpr size_t kStack = 64 * 1024;
  for (unsigned t = 0; t < threads; ++t) {
    own.stacks.emplace_back(new char[kStack]);
    getcontext(&own.fibers[t]);
    own.fibers[t].uc_stack.ss_sp = own.stacks[t].get();
    own.fibers[t].uc_stack.ss_size = kStack;
    own.fibers[t].uc_link = nullptr;
    makecontext(&own.fibers[t], fiber_main, 0);
  }
  std::vector<unsigned> turn(threads);
  std::iota(turn.begin(), turn.end(), 0u);
  if (order == Order::kDescending) std::reverse(turn.begin(), turn.end());
  if (order == Order::kScrambled) std::shuffle(turn.begin(), turn.end(), std::mt19937(index));
  unsigned left = threads;
  while (left > 0) {
    own.progress = false;
    for (const unsigned t : turn) {
      if (own.done[t]) continue;
      own.current = t;
      swapcontext(&own.scheduler, &own.fibers[t]);
      left -= own.done[t];
    }
    if (!own.progress) {
      std::fprintf(stderr, "cuda_host: deadlock, not all threads reached a barrier\n");
      std::abort();
    }
  }
  block = nullptr;
}

// Runs `blocks` blocks one after another, in this order.
inline void run_grid(unsigned blocks, unsigned threads, unsigned shared_bytes, Order order,
                     const std::function<void()>& body) {
  std::vector<unsigned> turn(blocks);
  std::iota(turn.begin(), turn.end(), 0u);
  if (order == Order::kDescending) std::reverse(turn.begin(), turn.end());
  if (order == Order::kScrambled) std::shuffle(turn.begin(), turn.end(), std::mt19937(blocks));
  for (const unsigned index : turn) run_block(index, threads, shared_bytes, order, body);
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return block->current; }
  } x;
};

}  // namespace cuda_host

inline cuda_host::ThreadIndex threadIdx;
#define blockIdx cuda_host::block_index

inline void __syncthreads() { cuda_host::wait(cuda_host::block->all); }
inline void __threadfence() {}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  const uint64_t* all = cuda_host::exchange(value);
  return static_cast<uint32_t>(*std::max_element(all, all + cuda_host::kWarp));
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
  const uint64_t* all = cuda_host::exchange(value);
  return static_cast<uint32_t>(*std::min_element(all, all + cuda_host::kWarp));
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  const uint64_t* all = cuda_host::exchange(value);
  return static_cast<uint32_t>(std::accumulate(all, all + cuda_host::kWarp, uint64_t{0}));
}
inline uint64_t __shfl_up_sync(uint32_t, uint64_t value, unsigned distance) {
  const unsigned lane = cuda_host::block->current % cuda_host::kWarp;
  const uint64_t* all = cuda_host::exchange(value);
  return lane >= distance ? all[lane - distance] : value;
}
inline uint64_t __shfl_sync(uint32_t, uint64_t value, int lane) { return cuda_host::exchange(value)[lane]; }
inline uint32_t __ballot_sync(uint32_t, bool set) {
  const uint64_t* all = cuda_host::exchange(set);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < cuda_host::kWarp; ++lane) votes |= static_cast<uint32_t>(all[lane]) << lane;
  return votes;
}
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __ffs(uint32_t value) { return __builtin_ffs(static_cast<int>(value)); }
inline uint32_t atomicInc(uint32_t* address, uint32_t limit) {
  const uint32_t old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address += value;
  return old;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
