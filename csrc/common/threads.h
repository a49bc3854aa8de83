// How many threads a kernel uses, and memory for them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace titok {

// One thread for each `work_per_thread` units of `work`: at least one, at most `limit` and at most PyTorch's number of
// threads, which is OpenMP's because both share one runtime.
inline int threads_for(double work, double work_per_thread, int64_t limit = INT32_MAX) {
  const double most = static_cast<double>(std::min<int64_t>(omp_get_max_threads(), std::max<int64_t>(limit, 1)));
  return static_cast<int>(std::clamp(work / work_per_thread, 1.0, most));
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kCacheLine = 64;  // bytes

struct DeleteAligned {
  void operator()(std::byte* block) const { ::operator delete(block, std::align_val_t{kCacheLine}); }
};
using AlignedBuffer = std::unique_ptr<std::byte, DeleteAligned>;

// Uninitialised memory, aligned to a cache line.
inline AlignedBuffer allocate_aligned(int64_t bytes) {
  return AlignedBuffer(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kCacheLine})));
}

}  // namespace titok
