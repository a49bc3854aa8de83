#include "add_layer_norm.h"

#include <omp.h>

#include "cpu_isa.h"
#include "huge_pages.h"

namespace titok {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;    // what waking another thread is worth
constexpr int64_t kStreamBytes = int64_t{64} << 20;  // results larger than this leave the caches anyway

AddLayerNormRows* rows_of_this_machine() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return avx512::add_layer_norm;
    case CpuIsa::kAvx2: return avx2::add_layer_norm;
#endif
    default: return generic::add_layer_norm;
  }
}

}  // namespace

void launch_add_layer_norm(const AddLayerNormArgs& args) {
  const int64_t elements = args.rows * args.width;
  const auto bytes = [&](RowType type) { return elements * (type == RowType::kBFloat16 ? 2 : 4); };
  AddLayerNormRows* const run = rows_of_this_machine();
  if (elements < 2 * kElementsPerThread) return run(args, 0, args.rows, false);

  ask_for_huge_pages(args.out, bytes(args.out_type));
  if (args.sum) ask_for_huge_pages(args.sum, bytes(args.x_type < args.residual_type ? args.x_type : args.residual_type));
  const bool aligned = args.width % 64 == 0 && reinterpret_cast<uintptr_t>(args.out) % 64 == 0;
  const bool stream = aligned && bytes(args.out_type) >= kStreamBytes;
  const int64_t most = elements / kElementsPerThread, limit = omp_get_max_threads();  // torch's: one shared runtime
#pragma omp parallel num_threads(static_cast<int>(most < limit ? most : limit))
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    run(args, args.rows * thread / threads, args.rows * (thread + 1) / threads, stream);
  }
}

}  // namespace titok
