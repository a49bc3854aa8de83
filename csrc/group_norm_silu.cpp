#include "group_norm_silu.h"

#include <omp.h>

#include <memory>

#include "cpu_isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace titok {
namespace {

// glibc maps a block of 32 MiB or more afresh each time, and touching it then costs more than the kernel: a page
// fault per 4 KiB. Huge pages, where the system grants them on request, make that one per 2 MiB.
void ask_for_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < (size_t{32} << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint: errors do not matter
#endif
}

}  // namespace

void launch_group_norm_silu(const GroupNormSiluArgs& args) {
  const size_t elements = static_cast<size_t>(args.batch) * args.pixels * args.channels;
  ask_for_huge_pages(args.out, elements * (args.out_is_bf16 ? 2 : 4));
  if (args.sum) ask_for_huge_pages(args.sum, elements * (args.x_is_bf16 ? 2 : 4));
  const int threads = omp_get_max_threads();  // torch's number: both share one OpenMP runtime
  const std::unique_ptr<double[]> scratch(new double[threads * group_norm_silu_scratch(args)]);
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return avx512::group_norm_silu(args, scratch.get(), threads);
    case CpuIsa::kAvx2: return avx2::group_norm_silu(args, scratch.get(), threads);
#endif
    default: return generic::group_norm_silu(args, scratch.get(), threads);
  }
}

}  // namespace titok
