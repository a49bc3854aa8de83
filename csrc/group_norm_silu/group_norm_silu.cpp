#include "group_norm_silu/group_norm_silu.h"

#include <omp.h>

#include <memory>

#include "common/cpu_isa.h"
#include "common/huge_pages.h"

namespace titok {
namespace {

// Of arguments and results together: more does not stay in a core's own caches, and a streamed store saves reading what
// it overwrites. A convolution that reads the result next takes no longer for it.
constexpr size_t kStreamBytes = size_t{8} << 20;

// The calling thread's, kept: its pages are touched by every call.
double* scratch_of(size_t size) {
  static thread_local std::unique_ptr<double[]> scratch;
  static thread_local size_t capacity = 0;
  if (size > capacity) {
    scratch.reset(new double[size]);
    capacity = size;
  }
  return scratch.get();
}

}  // namespace

void launch_group_norm_silu(const GroupNormSiluArgs& given) {
  GroupNormSiluArgs args = given;
  const size_t elements = static_cast<size_t>(args.batch) * args.pixels * args.channels;
  const size_t map_bytes = elements * (args.x_is_bf16 ? 2 : 4), out_bytes = elements * (args.out_is_bf16 ? 2 : 4);
  ask_for_huge_pages(args.out, out_bytes);
  if (args.sum) ask_for_huge_pages(args.sum, map_bytes);
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(args.out) | reinterpret_cast<uintptr_t>(args.sum);
  const bool large = (args.residual ? 3 : 1) * map_bytes + out_bytes >= kStreamBytes;
  args.stream = large && addresses % 64 == 0 && args.channels % 32 == 0;
  const int threads = omp_get_max_threads();  // torch's number: both share one OpenMP runtime
  double* const scratch = scratch_of(threads * group_norm_silu_scratch(args));
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return avx512::group_norm_silu(args, scratch, threads);
    case CpuIsa::kAvx2: return avx2::group_norm_silu(args, scratch, threads);
#endif
    default: return generic::group_norm_silu(args, scratch, threads);
  }
}

}  // namespace titok
