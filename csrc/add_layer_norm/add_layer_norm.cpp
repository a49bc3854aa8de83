#include "add_layer_norm/add_layer_norm.h"

#include <omp.h>

#include <memory>

#include "common/cpu_isa.h"
#include "common/huge_pages.h"

namespace titok {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;    // what waking another thread is worth
constexpr int64_t kStreamBytes = int64_t{64} << 20;  // results larger than this leave the caches anyway

const AddLayerNormKernels& kernels_of_this_machine() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512: return avx512::kAddLayerNorm;
    case CpuIsa::kAvx2: return avx2::kAddLayerNorm;
#endif
    default: return generic::kAddLayerNorm;
  }
}

// Torch's number at most: both share one OpenMP runtime.
int threads_for(int64_t elements) {
  const int64_t most = elements / kElementsPerThread + 1, limit = omp_get_max_threads();
  return static_cast<int>(most < limit ? most : limit);
}

}  // namespace

void launch_add_layer_norm(const AddLayerNormArgs& args) {
  const int64_t elements = args.rows * args.width;
  const auto bytes = [&](RowType type) { return elements * (type == RowType::kBFloat16 ? 2 : 4); };
  const AddLayerNormKernels& kernels = kernels_of_this_machine();
  if (elements < 2 * kElementsPerThread) return kernels.forward(args, 0, args.rows, false);

  ask_for_huge_pages(args.out, bytes(args.out_type));
  if (args.sum) ask_for_huge_pages(args.sum, bytes(args.x_type < args.residual_type ? args.x_type : args.residual_type));
  const bool aligned = args.width % 64 == 0 && reinterpret_cast<uintptr_t>(args.out) % 64 == 0;
  const bool stream = aligned && bytes(args.out_type) >= kStreamBytes;
#pragma omp parallel num_threads(threads_for(elements))
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    kernels.forward(args, args.rows * thread / threads, args.rows * (thread + 1) / threads, stream);
  }
}

void launch_add_layer_norm_backward(const AddLayerNormBackwardArgs& args) {
  const AddLayerNormKernels& kernels = kernels_of_this_machine();
  const int64_t chunks = (args.rows + args.chunk_rows - 1) / args.chunk_rows;
  const int threads = threads_for(args.rows * args.width);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const std::unique_ptr<float[]> scratch(new float[2 * add_layer_norm_padded(args.width)]);
    kernels.backward(args, chunks * thread / team, chunks * (thread + 1) / team, scratch.get());
  }
}

}  // namespace titok
